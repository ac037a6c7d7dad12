"""The codes of this package's errors, and the page that lists them: `python -m megatron.remoe.preflight.codes`."""

CODES: dict[str, tuple[str, str]] = {
    "REMOE-E101": (
        "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR or MASTER_PORT in the environment is missing or makes no sense.",
        "Start with torchrun, which sets them, or unset them all.",
    ),
    "REMOE-E102": (
        "--moe-kernels triton cannot run on this machine.",
        "Install what the message names, or leave the flag out.",
    ),
    "REMOE-E103": ("Another training writes into the --save folder.", "Wait for it, stop it, or give another --save."),
    "REMOE-E104": (
        "training.lock in the --save folder was not written by this version of the program.",
        "If no training runs there, remove the file.",
    ),
    "REMOE-E105": ("A folder to write into cannot be written.", "Give another folder, or the right to write there."),
    "REMOE-E201": ("A required flag is missing.", "Give it a value above 0; there is no default."),
    "REMOE-E202": (
        "A setting does not go with --hybrid-layer-pattern.",
        "Change the pattern or leave the other flag out.",
    ),
    "REMOE-E203": (
        "Megatron would end at its first evaluation, report or save with this setting.",
        "Do what the message says.",
    ),
    "REMOE-E204": (
        "A setting assumes exactly k experts per token, or belongs to top-k routing alone.",
        "Leave it out, or use what the message names; refusals.md has the reasons.",
    ),
    "REMOE-E205": ("A setting of ReLU routing or --moe-granularity is out of range.", "Give a value in its range."),
    "REMOE-E206": ("--moe-warmup-topk and --moe-warmup-steps do not fit the other settings.", "Give both, in range."),
    "REMOE-E207": ("A setting does not go with --moe-baseline-router.", "Leave one of the two out."),
    "REMOE-E300": ("A data set or another input or output file is missing or wrong.", "Do what the message says."),
    "REMOE-E401": (
        "A checkpoint is damaged or was cut off, and no other one is whole.",
        "Restore the file, or give another --load.",
    ),
    "REMOE-E402": (
        "The iteration of --ckpt-step is damaged or not there.",
        "Give the iteration that the message names, or leave --ckpt-step out.",
    ),
    "REMOE-E403": (
        "Something that is no checkpoint is in the way: a file or folder with its name.",
        "Move it away.",
    ),
    "REMOE-E404": ("There is no checkpoint where one is asked for.", "Give the folder that a training had as --save."),
    "REMOE-E405": (
        "An object in a checkpoint is damaged or could run code; nothing of it was executed.",
        "Give an earlier iteration with --ckpt-step, or a checkpoint that you trust.",
    ),
    "REMOE-E406": ("Loaded weights are not finite.", "Go back to an earlier iteration with --ckpt-step."),
    "REMOE-E411": ("The checkpoint holds a model of another shape.", "Give its values, or another --load."),
    "REMOE-E412": (
        "The checkpoint's routing or model class is another one.",
        "Give its flags, or convert it with tools/convert_checkpoint.",
    ),
    "REMOE-E413": (
        "A setting that changes the result differs from the checkpoint's.",
        "Give the old value, another folder, --allow-changed-settings, or --finetune for a new training.",
    ),
    "REMOE-E414": (
        "The optimizer's state was saved for another layout or kind of optimizer.",
        "Go on as it was saved, save once more with --dist-ckpt-optim-fully-reshardable, or give --no-load-optim.",
    ),
    "REMOE-E415": (
        "The learning rate would follow another schedule than before.",
        "Give the old values, or one of the two flags that the message names.",
    ),
}


def page() -> str:
    """Return docs/errors.md."""
    rows = [f"| {code} | {cause} | {remedy} |" for code, (cause, remedy) in CODES.items()]
    return "\n".join(
        [
            "# Error codes",
            "",
            "Settings and files are checked before a training starts. Each error names the flag or file, its value and "
            "the remedy, and ends",
            "with its code. This page is written by `python -m megatron.remoe.preflight.codes > docs/errors.md`.",
            "",
            "| code | cause | remedy |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    print(page(), end="")
