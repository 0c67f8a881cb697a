"""The methods by name, one line each; others join through the entry point group ``manyedits.methods``."""

from __future__ import annotations

from manyedits.registry import Registry

METHODS = Registry(
    "method",
    {
        "rome": "manyedits.methods.rome:Rome",
        "r-rome": "manyedits.methods.r_rome:RRome",
        "memit": "manyedits.methods.memit:Memit",
        "pmet": "manyedits.methods.pmet:Pmet",
        "emmet": "manyedits.methods.emmet:Emmet",
        "alphaedit": "manyedits.methods.alphaedit:AlphaEdit",
        "ft-l": "manyedits.methods.ft:FtL",
        "ft-m": "manyedits.methods.ft:FtM",
    },
    "manyedits.methods",
)
