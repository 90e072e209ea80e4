"""The pipeline's stages, a module each: `work(…, folder, progress)` writes one result into an empty folder.

A module imports what it needs and nothing of the other stages, so its sources and theirs are what its result depends on
(lilliput.fingerprint). What a stage reads are the folders that earlier ones wrote.
"""
