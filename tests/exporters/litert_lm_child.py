"""Run as a process of its own: open a bundle with LiteRT-LM, answer a question, print what was seen as JSON.

    python litert_lm_child.py BUNDLE QUESTION MAX_TOKENS TEXT…

LiteRT-LM logs to stderr and can hang in native code, so tests give it a process and a time limit.
"""

from __future__ import annotations

import json
import sys

import litert_lm


def main(bundle: str, question: str, max_tokens: str, *texts: str) -> None:
    backend = litert_lm.Backend.CPU(thread_count=2)
    greedy = litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0, seed=0)
    with litert_lm.Engine(bundle, backend=backend, cache_dir=":nocache") as engine:
        seen = {"ids": [engine.tokenize(text) for text in texts], "ends": engine.eos_token_ids}
        with engine.create_conversation(sampler_config=greedy, max_output_tokens=int(max_tokens)) as conversation:
            seen["rendered"] = conversation.render_message_to_string(question)
            answer = conversation.send_message(question)
            seen["tokens"] = conversation.token_count
    print(json.dumps({**seen, "answer": str(answer)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
