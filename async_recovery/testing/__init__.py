"""The contracts of `Source` and `Ledger` as tests, for whoever writes one of their own.

Give a suite a name that pytest collects, and say how yours is made; each test says in its docstring what must hold::

    from async_recovery.testing import LedgerContract

    class TestMyLedger(LedgerContract):
        @pytest.fixture(autouse=True)
        def _place(self, tmp_path):
            self.path = tmp_path / "my.table"

        def make(self, **options):
            return MyLedger(self.path, **options)

        async def published(self):
            return read_records(self.path)

The tests are plain methods that run a loop of their own: they need no plugin, nor pytest itself.
"""

from ..torture import torture
from .ledger_contract import LedgerContract
from .source_contract import SourceContract

__all__ = ["LedgerContract", "SourceContract", "torture"]
