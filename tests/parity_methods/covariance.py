"""Our gathering of second moments over the recorded token ids against the recorded moments: all modules in one pass."""

from __future__ import annotations

from manyedits.methods.base import MomentParams
from manyedits.methods.moments import _Gathering
from parity_methods.stage import Stage
from parity_methods.table import FORWARD, Case, Row, Rule, Table


class CovarianceAdapter:
    method = "covariance"

    def rows(self, stage: Stage) -> list[Row]:
        recorded = dict(stage.golden.moments)
        ids = recorded.pop("token_ids").long()
        stage.model.reset()
        gathering = _Gathering(stage.model, list(recorded), MomentParams(), stage.supplies)
        gathering._see(ids)
        ours = gathering._finished()
        table = Table(self.method, recorded)
        case = Case(self.method, "-", "token_ids", "", ())
        for path in recorded:
            table.compare(case, path, Rule(".*", 2, FORWARD), ours[path])
        return table.close()


ADAPTER = CovarianceAdapter()
