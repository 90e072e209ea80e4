"""The block formats of GGUF files: read by the source, written by the exporter gguf_llamacpp."""
