"""Pre-train a language model with Megatron and ReMoE; the same program as `python -m megatron.remoe.pretrain`."""

from megatron.remoe.pretrain import main

if __name__ == "__main__":
    main()
