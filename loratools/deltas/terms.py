"""What the field calls each kind of delta, with its article, as sentences have it; `Delta.kind` is the word of reports and rules."""

from __future__ import annotations

TERMS = {
    "adalora": "an AdaLoRA", "bat": "a Bat", "boft": "a BOFT", "c3a": "a C3A", "chain": "a chained", "coupled": "a coupled",
    "delora": "a DeLoRA", "dora": "a DoRA", "experts": "a LoRA-of-experts", "fourierft": "a FourierFT", "frod": "a FRoD",
    "full": "a whole-tensor", "glora": "a GLoRA", "gralora": "a GraLoRA", "hra": "an HRA", "ia3": "an (IA)³", "kasa": "a KaSA",
    "loha": "a LoHa", "lokr": "a LoKr", "lora": "a LoRA", "miss": "a MiSS", "modulated": "a modulated", "oft": "an OFT",
    "olora": "an OLoRA", "osf": "an OSF", "padded": "a padded", "parameter": "a LoRA-of-parameters", "part": "a partial",
    "parts": "a partwise", "peanut": "a PEANuT", "pissa": "a PiSSA", "projected": "a projected", "pvera": "a PVeRA",
    "randlora": "a RandLoRA", "replacement": "a replacement", "road": "a RoAd", "rows": "a rows", "sparse": "a sparse",
    "spread": "a spread", "stacked": "a stacked", "tinylora": "a TinyLoRA", "tucker": "a Tucker", "unilora": "a UniLoRA",
    "vblora": "a VB-LoRA", "vera": "a VeRA", "waveft": "a WaveFT",
}  # fmt: skip


def term(kind: str) -> str:
    """The article and the field's own name of a kind; several kinds joined by "+" are told one after another."""
    return " and ".join(TERMS.get(one, f"a {one}") for one in kind.split("+"))
