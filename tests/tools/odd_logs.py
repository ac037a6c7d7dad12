"""Build logs that are damaged, or from other programs or versions. None may end a tool in a traceback."""

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

ARGS = {"train_iters": 20, "log_interval": 1, "eval_interval": 10, "seq_length": 64, "global_batch_size": 4}
ARGS |= {"num_experts": 4, "moe_router_topk": 1, "moe_relu_routing": True}


def _line(iteration: Any, **more: Any) -> dict[str, Any]:
    of_layers = {"1": 0.7, "2": 0.8}
    return {
        **{"kind": "log", "time": 1.7e9, "iteration": iteration, "lm_loss": 3.0, "learning_rate": 1e-3},
        **{"seconds_per_iteration": 0.1, "consumed_samples": 8, "global_batch_size": 4, "sparsity": 0.75},
        **{"target_sparsity": 0.75, "l1_coefficient": 1e-8, "layer_sparsity": of_layers, "guarded_layers": []},
        **{"tokens_per_expert": {"1": [0.1, 0.2, 0.3, 0.4], "2": [0.25] * 4}, "l1_loss": 1.0},
        **more,
    }


def _log(*records: Any, args: Any = None) -> str:
    start = {"kind": "start", "time": 1.7e9, "iteration": 0, "args": ARGS if args is None else args}
    return "".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in (start, *records))


def _with(name: str, *values: Any) -> str:
    """Return a log in which a figure has these values, one per line."""
    return _log(*(_line(1 + place, **{name: value}) for place, value in enumerate(values)))


WRONG = ("text", None, True, [1, 2], {"1": "x"}, {"x": 1.0}, -1, 0, 1e308, 10**400, "1.5", [], {}, "12" * 3000)
FIGURES = ("lm_loss", "sparsity", "target_sparsity", "seconds_per_iteration", "global_batch_size", "consumed_samples")
FIGURES += ("layer_sparsity", "tokens_per_expert", "guarded_layers", "l1_coefficient", "time")
SPARSE = " moe relu sparsity: 0.5 | moe relu l1 reg coeff: 1E-8 |"


def _printed(iteration: Any, more: str = "", loss: Any = 3.0) -> str:
    return (
        f" [2026-01-01 00:00:00.0] iteration {iteration}/ 20 | consumed samples: 4 | elapsed time per iteration (ms): "
        f"100.0 | global batch size: 4 | lm loss: {loss} |{more}\n"
    )


def metrics() -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of each odd metrics.jsonl."""
    texts: dict[str, str] = {f"wrong {name}": _with(name, *WRONG) for name in FIGURES}
    texts |= {f"only wrong {name}": _with(name, "x", "y") for name in FIGURES}
    texts |= {
        "empty": "",
        "blank lines": "\n\n \n",
        "no start": json.dumps(_line(1)) + "\n",
        "start alone": _log(),
        "arguments are a list": _log(_line(1), args=[1]),
        "arguments are text": _log(_line(1), args={name: "x" for name in ARGS}),
        "arguments are zero": _log(_line(1), _line(20), args=dict.fromkeys(ARGS, 0)),
        "arguments are huge": _log(_line(1), args=dict.fromkeys(ARGS, 10**30)),
        "arguments are nested": _log(_line(1), args={name: [{"x": [1]}] for name in ARGS}),
        "other types of lines": _log("[1]", '"text"', "3", "null", "true", _line(1)),
        "kind is a list": _log({"kind": ["log"], "iteration": 1}, _line(1)),
        "no iteration": _log({"kind": "log", "lm_loss": 1.0}, _line(1)),
        "iteration is text": _log(_line("1"), _line("x"), _line(None), _line(2.5), _line([1]), _line(True)),
        "iteration is huge": _log(_line(10**30), _line(2**53), _line(3)),
        "iterations repeat": _log(*(_line(1 + place // 3) for place in range(12))),
        "iterations are shuffled": _log(*(_line(at) for at in random.Random(0).sample(range(100), 50))),
        "NaN and infinity": _log('{"kind": "log", "iteration": 1, "lm_loss": NaN, "sparsity": Infinity}', _line(2)),
        "cut off": _log(_line(1), _line(2))[:-40],
        "cut off in the first line": _log()[:30],
        "cut off in the middle": _log(_line(1), json.dumps(_line(2))[:50], _line(3)),
        "lines run together": _log(json.dumps(_line(1)) + json.dumps(_line(2)), _line(3)),
        "deeply nested": _log("[" * 100_000, '{"a":' * 5000, _line(1)),
        "a very long line": _log("x" * 2_000_000, _line(1)),
        "carriage returns": _log(_line(1), _line(2)).replace("\n", "\r\n"),
        "experts change": _with("tokens_per_expert", {"1": [0.5, 0.5]}, {"1": [0.1] * 8}, {"2": [1.0]}, {}),
        "many layers": _with("layer_sparsity", {str(layer): 0.5 for layer in range(5000)}),
        "many names": _log(*(_line(at, **{f"x{at}_{n}": 1.0 for n in range(300)}) for at in range(1, 20))),
        "layers with odd names": _with("layer_sparsity", {"-1": 0.5, "1.5": 0.5, "²": 0.5, "9" * 40: 0.5, "": 0.5}),
        "validation with a wrong loss": _log(
            {"kind": "validation", "iteration": 3, "lm_loss": "x", "set": ["a"]},
            {"kind": "validation", "iteration": 20, "lm_loss": 1e400, "set": None},
            {"kind": "validation", "iteration": 20, "lm_loss": 1.0, "set": {"a": 1}, "final": "x"},
        ),
        "validation alone": "".join(
            json.dumps({"kind": "validation", "iteration": at, "lm_loss": 1.0}) + "\n" for at in (9, 3, 3)
        ),
        "names with markup": _log(
            {"kind": "validation", "iteration": 1, "lm_loss": 1.0, "set": "<script>alert(1)</script>@x{y}$z"},
            {"kind": "validation", "iteration": 2, "lm_loss": 1.0, "set": "<script>alert(1)</script>@x{y}$z"},
        ),
        "spikes": _with("lm_loss", *(1e300 if at == 50 else 2.0 for at in range(100))),
        "lone surrogate": _log('{"kind": "start", "iteration": 0, "args": {"lr": "\\ud800"}}', _line(1)),
    }
    for name, text in texts.items():
        yield name, text.encode()
    whole = _log(_line(1), _line(2)).encode()
    yield "binary", random.Random(1).randbytes(20_000) + b"\n"
    yield "zeros", bytes(20_000) + b"\n"
    yield "zeros behind", whole + bytes(5000)
    yield "bytes inside", whole.replace(b"0.75", b"\xff\xfe")
    yield "UTF-8 with a mark", b"\xef\xbb\xbf" + whole
    yield "UTF-16", whole.decode().encode("utf-16")
    yield "Latin-1", whole + '{"kind": "note", "iteration": 1, "text": "é"}\n'.encode("latin-1")


def printed() -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of each odd printed log."""
    argument: Callable[[str, Any], str] = lambda name, value: f"  {name} ........ {value}\n"  # noqa: E731
    nested = argument("lr", "[" * 5000) + argument("num_experts", "None") + argument("moe_granularity", "'x'")
    texts = {
        "empty": "",
        "no Megatron": "Traceback (most recent call last):\n  nothing\n",
        "arguments alone": argument("train_iters", 20),
        "arguments that are no values": nested + _printed(1, SPARSE),
        "granularity of zero": argument("num_experts", 8) + argument("moe_router_topk", 1)
        + argument("moe_granularity", 0) + _printed(1, SPARSE),
        "figures that are none": _printed(1, " sparsity: x | guarded layers: a,,1 |", "inf") + _printed(2, "", "nan"),
        "no time": _printed(1).replace("elapsed", "passed"),
        "iterations go backward": "".join(map(_printed, (5, 4, 9, 1))),
        "a huge iteration": _printed("9" * 30) + _printed("9" * 15),
        "validation that is none": " validation loss at iteration 1 on validation set | lm loss value: x |",
    }  # fmt: skip
    for name, text in texts.items():
        yield name, text.encode()
    yield "binary", random.Random(2).randbytes(20_000)
