"""What ``launch/compile.py`` prints."""

from collections.abc import Sequence

from jaxlinear.launching import roofline
from jaxlinear.launching.search import Candidate
from jaxlinear.launching.sizing import Sizing

_SHOWN = 8  # kinds of collectives


def table(sized: Sizing) -> str:
    """The full report, for people."""
    memory, limit = sized.memory, sized.memory_limit
    lines = [
        f"{sized.parameters:,} parameters on {sized.devices} devices, {sized.target}: {_mesh(sized)}, remat "
        f"{sized.remat}, microbatches {sized.microbatches}",
        "",
        f"memory per device, of {_gib(limit)}:",
    ]
    kinds = ("parameters", "optimizer", "batch", "gradients", "activations", "temporaries")
    lines += [f"  {name:24} {_gib(getattr(memory, name)):>11}" for name in kinds]
    lines += [f"  {'total':24} {_gib(memory.total):>11}   {_verdict(sized)}", ""]
    rows = roofline.grouped(sized.collectives or ())
    if rows:
        lines.append(
            f"{'collectives per step':26} {'over':20} {'devices':>7} {'runs':>6} {'received':>11} {'hidden':>7}"
        )
        for row in rows[:_SHOWN]:
            hidden = f"{row.hidden / row.runs:.0%}"
            runs = f"{row.runs}" if row.known else f">={row.runs}"
            over = "slices" if row.between_slices else " x ".join(row.axes) or "-"
            lines.append(f"  {row.kind:24} {over:20} {row.devices:7} {runs:>6} {_gib(row.bytes):>11} {hidden:>7}")
        if len(rows) > _SHOWN:
            lines.append(f"  and {len(rows) - _SHOWN} kinds more, {_gib(sum(row.bytes for row in rows[_SHOWN:]))}")
        lines.append("")
    lines += [*sized.choices, ""] if sized.choices else []
    time = sized.time
    exchanges, most = "not known, since there is no program", ""
    if time.exchanges is not None:
        exchanges = f"{time.exchanges:.4f}, of which {time.waited:.4f} waited for"
        if not time.counted:
            exchanges = f">= {exchanges}, since loops of unknown trip count are counted once"
    executed, products, mfu = f"{sized.executed_flops:.3e}", f"{time.products:.4f}", f"MFU at most {_mfu(sized)}"
    if not time.products_counted:
        executed, products = f">= {executed}", f">= {products}"
        mfu = "MFU is not bounded, since products in loops of unknown trip count are counted once"
    if time.most is not None:
        most = f", {time.most:.4f} s if nothing were hidden"
    lines += [
        f"FLOPs per step              {sized.flops:.3e} by formula, {executed} in the program's products",
        f"least seconds per step      products {products}, memory {time.memory:.4f}, exchanges {exchanges}",
        f"  so at least {time.least:.4f} s{most}; {mfu}",
        f"tokens                      {sized.tokens_a_step:,} per step, at most {sized.tokens_a_day:.3e} per day; "
        f"{sized.steps:,} steps take at least {sized.days:.2f} days",
    ]
    if sized.xla_seconds is not None:
        lines.append(f"XLA's own estimate          {sized.xla_seconds:.4f} s, each loop's body counted once")
    if sized.xla_cycles is not None:
        lines.append(
            f"XLA's estimate per device   {sized.xla_cycles / 1e6:.1f} million cycles, loops by their trip counts, without "
            "kernels and exchanges"
        )
    lines += [f"  assumed: {text}" for text in roofline.ASSUMPTIONS]
    return "\n".join(lines)


def ranking(found: Sequence[Sizing]) -> str:
    """What the search compiled, best first."""
    lines = [f"{'mesh':40} {'remat':12} {'microbatches':>12} {'memory':>10} {'least s':>9} {'MFU <=':>7}"]
    for sized in found:
        fits = "" if sized.fits else "  does not fit"
        lines.append(
            f"{_mesh(sized):40} {sized.remat:12} {sized.microbatches:12} {_gib(sized.memory.total):>10} "
            f"{sized.time.least:9.4f} {_mfu(sized):>7}{fits}"
        )
    return "\n".join(lines)


def advice(candidates: Sequence[Candidate]) -> str:
    """For a config that does not fit: settings that should, by the estimates."""
    if not candidates:
        return "by estimate, no mesh, remat policy and number of microbatches fits this batch on these devices"
    best = candidates[0]
    return f"by estimate, this would fit with {_gib(best.memory)} (--search=4 compiles it and others): {best.flags()}"


def _verdict(sized: Sizing) -> str:
    if sized.fits:
        return f"fits, {_gib(-sized.too_much)} to spare"
    return f"DOES NOT FIT: {_gib(sized.too_much)} too much"


def _mfu(sized: Sizing) -> str:
    return "-" if sized.mfu_bound is None else f"{sized.mfu_bound:.1%}"


def _mesh(sized: Sizing) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sized.mesh.items() if size > 1) or "one device"


def _gib(size: float) -> str:
    return f"{size / 2**30:.3f} GiB"
