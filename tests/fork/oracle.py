"""Train tiny models with the authors' own code, and keep their checkpoints, logits and losses in tests/fork.

    git clone https://github.com/thu-ml/ReMoE fork
    python3.11 -m venv venv
    venv/bin/pip install torch==2.5.1 numpy==1.26.4 einops packaging setuptools psutil pyyaml regex six
    venv/bin/python tests/fork/oracle.py fork

The fork runs on a CPU with stand-ins for CUDA and for Transformer Engine. Its saving code is unchanged, so names and
format are those of a training run on GPUs. It needs PyTorch 2.5: its writer does not run with the current one.
"""

import glob
import importlib.util
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import types
from pathlib import Path

import numpy
import torch

HERE = Path(__file__).resolve().parent
SAVED, LAST = 8, 18  # iterations
MODEL = """
--use-mcore-models --num-layers 2 --hidden-size 16 --num-attention-heads 2 --num-query-groups 1 --seq-length 16
--ffn-hidden-size 16 --max-position-embeddings 16 --tokenizer-type NullTokenizer --vocab-size 63
--make-vocab-size-divisible-by 8 --group-query-attention --normalization RMSNorm --swiglu --position-embedding-type rope
--no-position-embedding --rotary-base 1000000 --untie-embeddings-and-output-weights --disable-bias-linear
--attention-dropout 0 --hidden-dropout 0 --init-method-std 0.1 --no-masked-softmax-fusion
""".split()
TRAINING = f"""
--micro-batch-size 4 --global-batch-size 8 --clip-grad 1.0 --eval-interval 1000 --eval-iters 0 --lr 4e-3 --min-lr 4e-4
--lr-decay-style cosine --lr-warmup-fraction 0.01 --log-interval 1 --split 90,10,0 --train-iters {LAST}
--save-interval {SAVED}
""".split()
ON_A_CPU = """
--distributed-backend gloo --no-gradient-accumulation-fusion --no-persist-layer-norm --no-rope-fusion
--no-bias-dropout-fusion --no-bias-swiglu-fusion
""".split()
TOPK = """
--num-experts 4 --moe-router-topk 1 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
--moe-token-dispatcher-type alltoall --moe-router-pre-softmax
""".split()
RELU = [*TOPK, *"--moe-relu-routing --moe-relu-l1-reg-coeff-init 1e-4".split()]
# As in the fork's scripts, on a machine with Transformer Engine.
ENGINE = "--transformer-impl transformer_engine --use-distributed-optimizer --sequence-parallel".split()
LOCAL = "--transformer-impl local".split()
KINDS = {
    "dense": LOCAL,
    "topk": [*TOPK, *ENGINE, *"--moe-grouped-gemm --overlap-grad-reduce --overlap-param-gather --bf16".split()],
    "remoe": [*RELU, *ENGINE, *"--moe-grouped-gemm --moe-granularity 2 --moe-layer-recompute --bf16".split()],
}
KEPT = ("dense", "topk", "remoe")


def write_data(prefix: Path) -> None:
    """Write 40 documents of 200 tokens. Each token is the previous one plus 7, 14 or 21, modulo 63."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    random = numpy.random.RandomState(1)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for _ in range(40):
        document = numpy.cumsum(random.randint(1, 4, size=200)) * 7 % 63
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")


def tokens() -> torch.Tensor:
    """Return the batch `[2, 16]` that logits are recorded for."""
    return torch.arange(32).view(2, 16) * 7 % 63


def main(fork: str) -> None:
    """Write an archive for each kind of model in `KEPT`, and a checkpoint of one file without weights."""
    torch.save({"rng_state": [{"np_rng_state": numpy.random.get_state()}]}, HERE / "one_file.pt")
    with tempfile.TemporaryDirectory() as folder:
        for kind in KEPT:
            make(fork, kind, Path(folder) / kind)
            pack(Path(folder) / kind)


def pack(folder: Path) -> None:
    """Pack the checkpoint and its expected results into an archive."""
    with tarfile.open(HERE / f"{folder.name}.tar.xz", "w:xz") as archive:
        for name in (f"iter_{SAVED:07d}", "latest_checkpointed_iteration.txt", "expected.pt"):
            archive.add(folder / name, name)


def make(fork: str, kind: str, folder: Path) -> None:
    """Train a kind of model until `LAST`, save it at `SAVED`, and record logits there and losses after it."""
    folder.mkdir(parents=True)
    flags = [*KINDS[kind], *f"--data-path {folder}/data --save {folder} --load {folder}".split()]
    command = [sys.executable, "-W", "ignore", __file__, fork, str(folder), *MODEL, *TRAINING, *ON_A_CPU, *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    losses = [float(loss) for loss in re.findall(r"lm loss: (\S+)", result.stdout)]
    assert result.returncode == 0 and len(losses) == LAST, result.stdout[-3000:] + result.stderr[-3000:]
    torch.save(torch.load(folder / "expected.pt") | {"losses": losses[SAVED:]}, folder / "expected.pt")
    shutil.rmtree(folder / f"iter_{LAST:07d}")
    (folder / "latest_checkpointed_iteration.txt").write_text(str(SAVED))


class FusedAdam(torch.optim.Optimizer):
    """AdamW that keeps its step in the parameter group, like Transformer Engine's."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0) -> None:
        super().__init__(params, dict(lr=lr, bias_correction=True, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (first, second), step = group["betas"], group["step"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state.update(exp_avg=torch.zeros_like(weight), exp_avg_sq=torch.zeros_like(weight))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg"].lerp_(weight.grad, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(weight.grad, weight.grad, value=1 - second)
                scale = (state["exp_avg_sq"] / (1 - second**step)).sqrt_().add_(group["eps"])
                weight.addcdiv_(state["exp_avg"], scale, value=-group["lr"] / (1 - first**step))


class EngineModule(torch.nn.Module):
    """A layer with the interface of Transformer Engine's, without FP8."""

    fp8 = fp8_calibration = False

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta = {"fp8_checkpoint": False}

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        pass

    def get_extra_state(self) -> io.BytesIO:
        stream = io.BytesIO()
        torch.save(None, stream)
        return stream

    def set_extra_state(self, state: object) -> None:
        pass


class RMSNorm(EngineModule):
    def __init__(self, hidden_size, eps, params_dtype, **_options) -> None:
        super().__init__()
        self.eps, self.weight = eps, torch.nn.Parameter(torch.ones(hidden_size, dtype=params_dtype))

    def forward(self, hidden):
        return torch.nn.functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class Linear(EngineModule):
    def __init__(self, in_features, out_features, init_method, params_dtype, **_options) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype))
        init_method(self.weight)

    def forward(self, hidden, is_first_microbatch=None):
        return torch.nn.functional.linear(hidden, self.weight)


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, init_method, params_dtype, eps, **_options) -> None:
        super().__init__(in_features, out_features, init_method, params_dtype)
        self.eps, self.layer_norm_weight = eps, torch.nn.Parameter(torch.ones(in_features, dtype=params_dtype))

    def forward(self, hidden, is_first_microbatch=None):
        weight = self.layer_norm_weight
        return super().forward(torch.nn.functional.rms_norm(hidden, weight.shape, weight, self.eps))


class GroupedLinear(EngineModule):
    def __init__(self, num_gemms, in_features, out_features, init_method, params_dtype, **_options) -> None:
        super().__init__()
        self.num_gemms, self.use_bias = num_gemms, False
        for number in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype))
            init_method(weight)
            self.register_parameter(f"weight{number}", weight)

    def forward(self, hidden, m_splits, is_first_microbatch=None):
        parts = zip(hidden.split(m_splits), range(self.num_gemms), strict=True)
        return torch.cat([torch.nn.functional.linear(part, getattr(self, f"weight{number}")) for part, number in parts])


class DotProductAttention(EngineModule):
    def __init__(self, **_options) -> None:
        super().__init__()

    def forward(self, query, key, value, _mask, **_options):
        groups = query.shape[2] // key.shape[2]
        key, value = (part.repeat_interleave(groups, dim=2) for part in (key, value))
        heads = [part.permute(1, 2, 0, 3) for part in (query, key, value)]
        output = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        return output.permute(2, 0, 1, 3).flatten(2)


def install_engine() -> None:
    """Install a stand-in for the package `transformer_engine`."""
    names = ("", ".common", ".common.recipe", ".pytorch", ".pytorch.distributed", ".pytorch.optimizers")
    modules = {name: types.ModuleType(f"transformer_engine{name}") for name in names}
    for name, module in modules.items():
        sys.modules[module.__name__] = module
        parent, _, child = name.rpartition(".")
        if child:
            setattr(modules[parent], child, module)
    modules[""].__version__ = "1.11.0"
    modules[".common.recipe"].DelayedScaling = modules[".pytorch.distributed"].CudaRNGStatesTracker = object
    vars(modules[".pytorch.optimizers"]).update(FusedAdam=FusedAdam, FusedSGD=None)
    layers = (RMSNorm, Linear, LayerNormLinear, GroupedLinear, DotProductAttention)
    vars(modules[".pytorch"]).update({layer.__name__: layer for layer in layers}, LayerNorm=None)


def load_file(name: str, path: object) -> types.ModuleType:
    """Import the file at `path` as the module `name`."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def build_helpers(folder: str) -> None:
    """Compile the fork's helpers for data sets with the pybind11 that comes with PyTorch."""
    includes = [f"-I{Path(torch.__file__).parent}/include", f"-I{sysconfig.get_path('include')}"]
    output = f"{folder}/helpers_cpp{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-O2", "-shared", "-std=c++17", "-fPIC", *includes]
    subprocess.run(["g++", *flags, f"{folder}/helpers.cpp", "-o", output], check=True)


def train(fork: str, folder: Path) -> None:
    """Run the fork's pretrain_gpt.py in this process with the rest of the command line."""
    here = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="29731")
    for name, value in (here | dict(TORCHDYNAMO_DISABLE="1", CUDA_DEVICE_MAX_CONNECTIONS="1")).items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(1)
    load_file("facade", HERE.parents[1] / "megatron/remoe/cpu/facade.py").install_facade()
    stock = torch.Tensor.type
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self
    torch.Tensor.type = lambda self, *args: stock(self, *args) if args else stock(self).replace("torch.", "torch.cuda.")
    if "transformer_engine" in sys.argv:
        install_engine()
    sys.path.insert(0, fork)

    if not glob.glob(f"{fork}/megatron/core/datasets/helpers_cpp*.so"):
        build_helpers(f"{fork}/megatron/core/datasets")
    import megatron.core.tensor_parallel.random as random
    import megatron.training.initialize as initialize
    import megatron.training.training as training

    random._set_cuda_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)
    random._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    initialize._compile_dependencies = lambda: None
    write_data(folder / "data")
    save = training.save_checkpoint_and_time

    def save_and_record(iteration, model, *rest, **options):
        if iteration == SAVED:
            save(iteration, model, *rest, **options)
            ids = tokens()
            positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
            mask = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()[None, None]
            inner = model[0]
            while hasattr(inner, "module"):
                inner = inner.module
            weights = {name: weight.detach().float() for name, weight in inner.named_parameters()}
            inner.eval()
            with torch.no_grad():
                logits = torch.func.functional_call(inner, weights, (ids, positions, mask))
            inner.train()
            torch.save({"tokens": ids, "logits": logits}, folder / "expected.pt")

    training.save_checkpoint_and_time = save_and_record
    sys.argv[0] = f"{fork}/pretrain_gpt.py"
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        source, output = sys.argv[1], Path(sys.argv[2])
        del sys.argv[1:3]
        train(source, output)
    else:
        main(sys.argv[1])
