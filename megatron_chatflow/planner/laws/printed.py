"""Constants as papers print them: to look at, never to plan with.

Rounding to two digits changes laws of this kind far outside of their runs. The printed constants of
continued training (arXiv 2407.02118) put it behind training from scratch beyond some billions of
tokens, against the figures of the same paper.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_chatflow.planner.laws.allocation import PowerLaw

PRINTED: Mapping[str, PowerLaw] = {
    "arXiv 2407.02118, scratch": PowerLaw(1.55, 420.0, 0.40, 719.5, 0.30),
    "arXiv 2407.02118, continued": PowerLaw(1.55, 420.0, 0.40, 433.3, 0.20, 0.08),
    "arXiv 2203.15556 (Chinchilla)": PowerLaw(1.69, 406.4, 0.34, 410.7, 0.28),
    "arXiv 2404.10102 (Chinchilla refitted)": PowerLaw(1.8172, 482.01, 0.3478, 2085.43, 0.3658),
}
"""{source: law}."""

_SIZES = (1.4e9, 5.5e9, 7e9)


def tokens_of_equal_loss(scratch: PowerLaw, continued: PowerLaw, params: float) -> float:
    """Return the tokens beyond which continued training is worse than scratch at a size.

    For laws with one E and A, and beta above beta'.
    """
    ratio = scratch.B * params**continued.gamma / continued.B
    return float(ratio ** (1 / (scratch.beta - continued.beta)))


def lines() -> list[str]:
    """Return what `fit --as-printed` prints."""
    found = ["constants as papers print them; nothing is planned with them, fit your own runs"]
    for source, law in PRINTED.items():
        interaction = f" gamma {law.gamma:g}" if law.gamma else ""
        a, b = law.exponents
        g = law.best(6.0)[0]
        found.append(
            f"  {source}: E {law.E:g} A {law.A:g} alpha {law.alpha:g} B {law.B:g} beta "
            f"{law.beta:g}{interaction}; as printed N = {g * 6**-a:.3g} C^{a:.3f}, "
            f"D = {6**-b / g:.3g} C^{b:.3f}"
        )
    scratch, continued = (PRINTED[f"arXiv 2407.02118, {kind}"] for kind in ("scratch", "continued"))
    where = ", ".join(
        f"{tokens_of_equal_loss(scratch, continued, n) / 1e9:.1f}B tokens at {n / 1e9:g}B"
        for n in _SIZES
    )
    found.append(
        f"  the two digits of arXiv 2407.02118 put continued training behind scratch beyond "
        f"{where} parameters, against the figures of that paper"
    )
    return found
