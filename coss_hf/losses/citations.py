"""The papers of the methods, as BibTeX."""

# Authors, title, where, year, arXiv number.
_COSS = (
    "Singh, A. and Wang, H.",
    "Simple Unsupervised Knowledge Distillation With Space Similarity",
    "ECCV",
    2024,
    "2409.13939",
)
_PAPERS = {
    "coss": _COSS,
    "bn": _COSS,
    "at": (
        "Zagoruyko, S. and Komodakis, N.",
        "Paying More Attention to Attention",
        "ICLR",
        2017,
        "1612.03928",
    ),
    "crd": (
        "Tian, Y. and Krishnan, D. and Isola, P.",
        "Contrastive Representation Distillation",
        "ICLR",
        2020,
        "1910.10699",
    ),
    "dist": (
        "Huang, T. and others",
        "Knowledge Distillation from A Stronger Teacher",
        "NeurIPS",
        2022,
        "2205.10536",
    ),
    "factor": (
        "Kim, J. and others",
        "Paraphrasing Complex Network: Network Compression via Factor Transfer",
        "NeurIPS",
        2018,
        "1802.04977",
    ),
    "hint": ("Romero, A. and others", "FitNets: Hints for Thin Deep Nets", "ICLR", 2015, "1412.6550"),
    "kd": (
        "Hinton, G. and Vinyals, O. and Dean, J.",
        "Distilling the Knowledge in a Neural Network",
        None,
        2015,
        "1503.02531",
    ),
    "nst": (
        "Huang, Z. and Wang, N.",
        "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer",
        None,
        2017,
        "1707.01219",
    ),
    "pkt": (
        "Passalis, N. and Tefas, A.",
        "Learning Deep Representations with Probabilistic Knowledge Transfer",
        "ECCV",
        2018,
        "1803.10837",
    ),
    "rkd": ("Park, W. and others", "Relational Knowledge Distillation", "CVPR", 2019, "1904.05068"),
    "seed": (
        "Fang, Z. and others",
        "SEED: Self-supervised Distillation For Visual Representation",
        "ICLR",
        2021,
        "2101.04731",
    ),
    "sp": ("Tung, F. and Mori, G.", "Similarity-Preserving Knowledge Distillation", "ICCV", 2019, "1907.09682"),
    "srrl": (
        "Yang, J. and others",
        "Knowledge distillation via softmax regression representation learning",
        "ICLR",
        2021,
        None,
    ),
    "vid": (
        "Ahn, S. and others",
        "Variational Information Distillation for Knowledge Transfer",
        "CVPR",
        2019,
        "1904.05835",
    ),
}


def papers(methods: list[str]) -> list[tuple[str, str | None, str]]:
    """Title, address and BibTeX entry of each method's paper, once."""
    found = {_PAPERS[method]: _entry(method, *_PAPERS[method]) for method in reversed(methods)}
    links = ((paper, entry) for paper, entry in reversed(found.items()))
    return [(paper[1], f"https://arxiv.org/abs/{paper[4]}" if paper[4] else None, entry) for paper, entry in links]


def _entry(method: str, authors: str, title: str, where: str | None, year: int, arxiv: str | None) -> str:
    fields = {"title": f"{{{title}}}", "author": authors, "booktitle": where, "year": year}
    fields |= {"eprint": arxiv, "archivePrefix": "arXiv"} if arxiv else {}
    lines = [f"  {key} = {{{value}}}" for key, value in fields.items() if value is not None]
    return f"@{'inproceedings' if where else 'misc'}{{{method}{year},\n" + ",\n".join(lines) + "\n}"
