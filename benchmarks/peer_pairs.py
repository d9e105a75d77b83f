"""What other tools do, and what of ours is the same thing."""

import dataclasses

from peer_brevitas import brevitas
from peer_flatquant import flatquant
from peer_quark import Training, quark, quark_learned
from peer_tools import Peer, auto_round, compressor

from latmix.recipe import Recipe, Tuning, override
from latmix.recipes import find

INPUTS = ("qkv", "o", "gate_up", "down")


@dataclasses.dataclass(frozen=True)
class Pair:
    """Another tool's run and the recipes it stands beside; `nearest`: rounding to nearest, which can be had with the
    gains in the norms, too."""

    peer: str
    run: Peer
    ours: tuple[Recipe, ...]
    nearest: bool = False

    @property
    def sides(self) -> tuple[str, ...]:
        return ("peer", *(recipe.name for recipe in self.ours), *(("in place",) if self.nearest else ()))


def everywhere(transform: str) -> Recipe:
    """GPTQ under a fixed transform at every input, at run time."""
    return dataclasses.replace(find("gptq"), name=f"gptq, {transform} online", online=dict.fromkeys(INPUTS, transform))


def like(preset: str, name: str, settings: dict[str, str]) -> Recipe:
    return override(find(preset), settings | {"name": f"{preset}, {name}"})


def codes_tuned(recipe: Recipe) -> Recipe:
    """Nothing learns but codes and scales, end to end."""
    return dataclasses.replace(recipe, name=f"{recipe.name}, codes tuned", tuning=Tuning(kept=(), biases=()))


LC, AR, QUARK, BREVITAS = "llm-compressor", "AutoRound", "Quark", "Brevitas"
ALL = {"rotations": ["R1", "R2", "R4"]}
OFFLINE = {"online.down": "none"}
FLOOR = {"weights": "mxfp4:scale=floor", "activations": "mxfp4:scale=floor"}
SEARCHED = FLOOR | {"weights": "mxfp4:scale=search"}
NORMS_ALONE = {"folded.values": "rotation:init=random-hadamard", "folded.up": "none"}
GPTQ_FLOOR = like("gptq", "floor", FLOOR)

PAIRS = {
    "rtn": Pair(f"{LC} RTN", compressor(gptq=False), (find("rtn"),), nearest=True),
    "gptq": Pair(f"{LC} GPTQ", compressor(), (find("gptq"),)),
    "r1r2": Pair(
        f"{LC} SpinQuant R1 R2 (Hadamard), GPTQ",
        compressor(spinquant={"rotations": ["R1", "R2"]}),
        (like("quarot", "nothing online", OFFLINE),),
    ),
    "r1r2r4": Pair(f"{LC} SpinQuant R1 R2 R4 (Hadamard), GPTQ", compressor(spinquant=ALL), (find("quarot"),)),
    "r1r2r4-32": Pair(
        f"{LC} SpinQuant R1 R2 R4 in blocks of 32, GPTQ",
        compressor(spinquant=ALL | {"transform_block_size": 32}),
        (find("block-hadamard"),),
    ),
    "quip": Pair(
        f"{LC} QuIP (random Hadamard), GPTQ", compressor(quip={"rotations": ["v"]}), (everywhere("hadamard"),)
    ),
    "quip-32": Pair(
        f"{LC} QuIP in blocks of 32, GPTQ",
        compressor(quip={"rotations": ["v"], "transform_type": "hadamard", "transform_block_size": 32}),
        (find("mr-gptq"), everywhere("block-hadamard")),
    ),
    "quark": Pair(f"{QUARK} R1 R2 R4 (Hadamard), GPTQ", quark(None), (find("quarot"),)),
    "quark-32": Pair(f"{QUARK} R1 R2 R4 in blocks of 32, GPTQ", quark(32), (find("block-hadamard"),)),
    "brevitas": Pair(f"{BREVITAS} R1 R2 R4 (Hadamard), GPTQ", brevitas(learn=False), (find("quarot"),)),
    "brevitas-learned": Pair(
        f"{BREVITAS} R1 R2 learned, R4 (Hadamard), GPTQ", brevitas(learn=True), (find("spinquant"),)
    ),
    "quark-learned": Pair(
        f"{QUARK} R1 R2 learned, GPTQ", quark_learned(Training()), (like("spinquant", "nothing online", OFFLINE),)
    ),
    "quark-scales": Pair(
        f"{QUARK} R1 R2 and scales after norms learned on KL, GPTQ",
        quark_learned(Training("kl_top", scales=("r1",))),
        (like("ostquant", "scales in norms alone, nothing online", OFFLINE | NORMS_ALONE),),
    ),
    "flatquant": Pair(
        "msModelSlim FlatQuant, RTN", flatquant(), (like("flatquant", "rounded to nearest", {"quantizer": "rtn"}),)
    ),
    "auto-0": Pair(
        f"{AR}, 0 iterations",
        auto_round(0),
        (like("rtn", "weights search, inputs floor", SEARCHED),),
        nearest=True,
    ),
    "auto-200": Pair(f"{AR}, 200 iterations", auto_round(200), (GPTQ_FLOOR, codes_tuned(GPTQ_FLOOR))),
}
