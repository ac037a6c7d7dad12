"""Read and check the parallel layout of a training run."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..console.errors import ToolError

NAMES = {"TP": "tp", "PP": "pp", "VPP": "vpp", "EP": "ep", "CP": "cp"}


class RecipeError(ToolError):
    """An argument or environment variable is wrong; the message names it, its value and the remedy."""

    exit_code = 2


def parse_count(name: str, text: str) -> int:
    """Convert a text to a number; raise RecipeError if it is no whole number of at least 1."""
    if not re.fullmatch("[1-9][0-9]*", text):
        raise RecipeError(f"{name} is '{text}': give a whole number of at least 1")
    return int(text)


@dataclass(frozen=True)
class Layout:
    """Processes (one per GPU), and parallel sizes: tensor, pipeline, virtual stages of each, expert, context."""

    gpus_per_node: int
    nodes: int
    tp: int
    pp: int
    vpp: int
    ep: int
    cp: int

    @classmethod
    def read(cls, gpus_per_node: int, environment: Mapping[str, str]) -> "Layout":
        """Return the layout that environment variables ask for.

        Raises:
            RecipeError: a variable is not a whole number of at least 1.
        """
        nodes = environment.get("NNODES") or environment.get("SLURM_NNODES") or "1"
        sizes = {field: parse_count(name, environment.get(name) or "1") for name, field in NAMES.items()}
        return cls(gpus_per_node, parse_count("NNODES", nodes), **sizes)

    def flags(self, has_experts: bool) -> list[str]:
        """Return Megatron's flags for these sizes, except for the virtual stages."""
        words = ["--tensor-model-parallel-size", str(self.tp), "--pipeline-model-parallel-size", str(self.pp)]
        words += ["--context-parallel-size", str(self.cp)]
        if self.tp > 1:
            words.append("--sequence-parallel")
        if has_experts:
            words += ["--expert-model-parallel-size", str(self.ep)]
        return words

    def launcher(self, interpreter: str, environment: Mapping[str, str], is_dry_run: bool) -> list[str]:
        """Return torchrun's words in front of the program.

        Raises:
            RecipeError: there are several nodes, and MASTER_ADDR or this node's rank is missing in a run.
        """
        words = [interpreter, "-m", "torch.distributed.run", "--nproc-per-node", str(self.gpus_per_node)]
        words += ["--nnodes", str(self.nodes)]
        if self.nodes == 1:
            return [*words, "--standalone"]
        address = environment.get("MASTER_ADDR") or "MASTER_ADDR" * is_dry_run
        if not address:
            name = "NNODES" if environment.get("NNODES") else "SLURM_NNODES"
            raise RecipeError(
                f"{name}={self.nodes} needs MASTER_ADDR: set it to the first node's name, or set NNODES=1"
            )
        rank, port = str(self.node_rank(environment, is_dry_run)), environment.get("MASTER_PORT") or "29500"
        return [*words, "--node-rank", rank, "--master-addr", address, "--master-port", port]

    def node_rank(self, environment: Mapping[str, str], is_dry_run: bool = False) -> int:
        """Return this node's rank; in a dry run, a node without a rank is the first.

        Raises:
            RecipeError: there are several nodes, and this node's rank is missing or too large.
        """
        if self.nodes == 1:
            return 0
        ranks = (environment.get(name) for name in ("NODE_RANK", "RANK", "SLURM_NODEID"))
        rank = next(filter(None, ranks), "0" if is_dry_run else "")
        if not re.fullmatch("[0-9]{1,9}", rank) or int(rank) >= self.nodes:
            raise RecipeError(
                f"the node's rank (NODE_RANK, RANK or SLURM_NODEID) is '{rank}': give a number below "
                f"NNODES={self.nodes}"
            )
        return int(rank)
