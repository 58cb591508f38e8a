"""The tables in a PostgreSQL database, version 1, and what is read from them. They lie in the first schema of the
user's search_path, next to the tables of others or not::

    async_recovery_schema   version
    async_recovery_fence    name, epoch, owner, generation, mark, holder (JSON): who may write the run of that name
    async_recovery_run      id, name, complete, kept, checkpoint (a line as in a journal, see `checkpoint`)
    async_recovery_record   run, index, record (JSON)                      below the mark
    async_recovery_ahead    run, index, item_crc, record, crc              finished ahead of it
    async_recovery_spent    run, index, attempts, starts                   of items that are not finished
    async_recovery_results  run (its name), index, record                  a view: complete runs only

A record is `json` and not `jsonb`: json keeps the text as it is, to the byte, so that an export, and the CRC-32 of the
run, are those of a file. jsonb would sort the keys, drop those that come twice, round what is too long, and refuse a
``\\u0000`` in a string. A reader who wants its operators writes ``record::jsonb``.
"""

from __future__ import annotations

from typing import Any

import msgspec

from .checkpoint import Spent
from .database import SCHEMA, Left
from .errors import CheckpointUnusable
from .file_ledger import retry_of
from .lock import Holder

TABLES = f"""
CREATE TABLE async_recovery_schema (version integer NOT NULL);
INSERT INTO async_recovery_schema VALUES ({SCHEMA});
CREATE TABLE async_recovery_fence (
    name text PRIMARY KEY, epoch bigint NOT NULL, owner text NOT NULL, generation bigint NOT NULL, mark bigint NOT NULL,
    holder json
);
CREATE TABLE async_recovery_run (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text, complete boolean NOT NULL, kept boolean NOT NULL,
    checkpoint text NOT NULL, UNIQUE (name, complete)
);
CREATE TABLE async_recovery_record (
    run bigint, "index" bigint, record json NOT NULL, PRIMARY KEY (run, "index")
);
CREATE TABLE async_recovery_ahead (
    run bigint, "index" bigint, item_crc bigint NOT NULL, record text NOT NULL, crc bigint NOT NULL,
    PRIMARY KEY (run, "index")
);
CREATE TABLE async_recovery_spent (
    run bigint, "index" bigint, attempts bigint NOT NULL, starts bigint NOT NULL, PRIMARY KEY (run, "index")
);
CREATE VIEW async_recovery_results AS
    SELECT run.name AS run, record."index" AS "index", record.record AS record
    FROM async_recovery_run AS run JOIN async_recovery_record AS record ON record.run = run.id
    WHERE run.complete AND run.name IS NOT NULL;
"""
PARTS = ("record", "ahead", "spent")
WRITTEN = ("fence", "run", *PARTS)
COLUMNS = {
    "record": ("run", "index", "record"),
    "ahead": ("run", "index", "item_crc", "record", "crc"),
    "spent": ("run", "index", "attempts", "starts"),
}
_SCHEMA_USED = """
    coalesce(
        (
            SELECT nspname::text FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
            WHERE relname = 'async_recovery_fence' AND pg_table_is_visible(pg_class.oid)
        ),
        current_schema()::text
    )
"""
KEY = f"hashtextextended('async_recovery ' || {_SCHEMA_USED} || ' ' || $1, 0)"
"""The number of an advisory lock, by a run's name and the schema of its tables: the one where they are found, whoever
finds them; as long as there are none, the one where they will be made."""


async def has_tables(connection: Any, shown: str) -> bool:
    """Whether the tables of this package are there.

    :raises CheckpointUnusable: if they are those of another version.
    """
    # Not to_regclass, which may not know yet what another session has just made.
    there = (
        "SELECT EXISTS (SELECT 1 FROM pg_class WHERE relname = 'async_recovery_schema' AND pg_table_is_visible(oid))"
    )
    if not await connection.fetchval(there):
        return False
    versions = [version for (version,) in await connection.fetch("SELECT version FROM async_recovery_schema")]
    if versions != [SCHEMA]:
        found = ", ".join(map(str, versions)) or "none"
        raise CheckpointUnusable(
            f"the tables of async_recovery in {shown} have the version {found}, this one reads {SCHEMA}: use the "
            "version of async_recovery that made them, or another database or schema"
        )
    return True


async def look(connection: Any, run: str) -> tuple[int | None, int | None, Left]:
    """What a run has left: the life that is being worked on, the complete one, and all that is to be known of them."""
    lives = "SELECT complete, id, checkpoint, kept FROM async_recovery_run WHERE name = $1"
    found = {complete: rest for complete, *rest in await connection.fetch(lives, run)}
    working, line, _ = found.get(False, (None, None, False))
    complete, complete_line, kept = found.get(True, (None, None, False))
    records, last = await counted(connection, working)
    ahead = 'SELECT "index", item_crc, record, crc FROM async_recovery_ahead WHERE run = $1'
    spent = 'SELECT "index", attempts, starts FROM async_recovery_spent WHERE run = $1'
    left = Left(
        line=None if line is None else line.encode(),
        records=records,
        last=last,
        ahead=[(row[0], row[1], row[2].encode(), row[3]) for row in await connection.fetch(ahead, working)],
        spent=[Spent(*row) for row in await connection.fetch(spent, working)],
        complete_line=None if complete_line is None else complete_line.encode(),
        kept=bool(kept),
    )
    return working, complete, left


async def counted(connection: Any, life: int | None) -> tuple[int, int]:
    """How many records a life has, and the highest index of one."""
    query = 'SELECT count(*), coalesce(max("index"), -1) FROM async_recovery_record WHERE run = $1'
    records, last = await connection.fetchrow(query, life)
    return records, last


async def joined(connection: Any, life: int | None, first: int, end: int) -> bytes:
    """The records from `first` up to `end`, in order, each with a line end."""
    query = (
        "SELECT string_agg(record::text, E'\\n' ORDER BY \"index\") FROM async_recovery_record "
        'WHERE run = $1 AND "index" >= $2 AND "index" < $3'
    )
    lines = await connection.fetchval(query, life, first, end)
    return b"" if lines is None else str(lines).encode() + b"\n"


async def holder_of(connection: Any, run: str) -> Holder | None:
    """Who works on a run now, also who runs its failed items again; None if nobody holds its lock."""
    held = (
        f"WITH key AS (SELECT {KEY} AS key) SELECT EXISTS (SELECT 1 FROM pg_locks, key WHERE locktype = 'advisory' AND "
        "objsubid = 1 AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND granted AND "
        "((classid::bigint << 32) | objid::bigint) = key)"
    )
    if not await connection.fetchval(held, run):
        return None
    name = retry_of(run) if await connection.fetchval(held, retry_of(run)) else run
    found = await connection.fetchval("SELECT holder FROM async_recovery_fence WHERE name = $1", name)
    return Holder(0, "?", 0.0) if found is None else msgspec.json.decode(found, type=Holder)
