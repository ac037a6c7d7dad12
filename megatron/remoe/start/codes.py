"""List the codes of this package's errors. `python -m megatron.remoe.start.codes` prints docs/errors.md."""

# code | cause | remedy
CODES = """
REMOE-E102 | --moe-kernels cannot be used on this machine. | Install the named package, or leave the flag out.
REMOE-E103 | Another training run uses the --save folder. | Wait for it, stop it, or give a different --save.
REMOE-E105 | An output folder cannot be written, or is not shared. | Give a different folder, or allow writing there.
REMOE-E201 | A required flag is missing. | Give it a value above 0.
REMOE-E202 | A setting does not work with --hybrid-layer-pattern. | Change the pattern or leave the other flag out.
REMOE-E203 | A setting would be ignored, or fail after the start. | Follow the message; see checkpoints.md.
REMOE-E204 | A setting does not work with ReLU routing. | Leave it out, or follow the message; see refusals.md.
REMOE-E205 | A setting of ReLU routing or --moe-granularity is out of range. | Give a value in its range.
REMOE-E206 | --moe-warmup-topk and --moe-warmup-steps do not fit the other settings. | Give both, in range.
REMOE-E207 | A setting does not work with --moe-baseline-router. | Leave one of them out.
REMOE-E208 | A setting does not work with --moe-log-flips-interval. | Leave one of them out.
REMOE-E209 | An optimizer does not work with --transformer-impl local. | Follow the message.
REMOE-E300 | An input or output file is missing, wrong or in use. | Follow the message.
REMOE-E301 | A data set is missing or cannot be read. | Give the prefix of a .bin/.idx pair, without suffix.
REMOE-E302 | A data set is truncated or corrupt. | Copy or make it again; remoe inspect checks it.
REMOE-E303 | The weights of the data sets are wrong. | Put one number above 0 before each prefix.
REMOE-E304 | A split of the data is empty, too small or invalid. | Give more data or a different --split.
REMOE-E305 | Token ids do not fit the vocabulary. | Give the tokenizer that the data was made with.
REMOE-E307 | GPT-2's vocabulary files are missing or wrong. | Give --vocab-file and --merge-file.
REMOE-E401 | A checkpoint is damaged or unfinished, and no other one is whole. | Restore it, or give a different --load.
REMOE-E402 | The iteration of --ckpt-step is damaged or missing. | Give the one in the message, or none.
REMOE-E404 | There is no checkpoint in the given folder. | Give the --save folder of a training run.
REMOE-E405 | A checkpoint's object could run code; it was not executed. | Give a different checkpoint or --ckpt-step.
REMOE-E407 | The run would overwrite newer checkpoints in --save. | Add --load with it, or give a different --save.
REMOE-E413 | A setting that changes the result differs from the checkpoint's. | Follow the message; see checkpoints.md.
REMOE-E500 | A tool cannot continue. | Follow the message.
REMOE-E501 | A tool's flag does not fit the model or another flag. | Give a value as the message says.
REMOE-E502 | A run has no log, or the file is not a log. | Give a run's folder or its --save.
REMOE-E503 | Another process uses the tool's output folder. | Wait for it, or give a different --output-dir.
REMOE-E504 | A package or file that a tool needs is missing. | Install or get it as the message says.
REMOE-E511 | A tool cannot read a checkpoint or exported folder. | Choose a different --ckpt-step, or export again.
REMOE-E512 | A model has settings that the other format does not support. | None: such a model cannot be converted.
REMOE-E513 | A model's tokenizer is missing, unreadable or too large. | Give a folder with --tokenizer-model.
REMOE-E514 | A converted model differs from its source; nothing was written. | Report this error.
""".strip().splitlines()

PAGE = """# Error codes

An error names the flag or file, its value and the remedy, and ends with its code. Codes of the tools
begin with E5.
Made by `python -m megatron.remoe.start.codes > docs/errors.md`.

| code | cause | remedy |
|---|---|---|
"""


def page() -> str:
    """Return docs/errors.md."""
    return PAGE + "".join(f"| {line} |\n" for line in CODES)


if __name__ == "__main__":
    print(page(), end="")
