"""`varkit studio`: the web page."""

import os
from dataclasses import dataclass

from varkit.cli.listening import LOOPBACK, check_port, named_models
from varkit.errors import UserError

PASSWORD = "VARKIT_PASSWORD"
FIRST_PORT, PORTS = 7860, 100
SECONDS_TO_FINISH = 2


@dataclass(frozen=True)
class Studio:
    """Open the web page: draw, edit, take apart and compare pictures in a browser."""

    model: tuple[str, ...] = ()
    """Bundled models, saved folders, or trainings' output folders; all bundled models by default."""
    host: str = "127.0.0.1"
    """Address to listen on; one that other machines reach needs --user."""
    port: int | None = None
    """Port to listen on; by default 7860, or the next free one."""
    user: str | None = None
    """Ask visitors for this name, and for the password in the environment variable VARKIT_PASSWORD."""
    workers: int = 2
    """Runs that go on at once; others wait their turn."""

    def __post_init__(self) -> None:
        check_port(self.port)
        if self.workers < 1:
            raise UserError(f"--workers is {self.workers}; it must be at least 1")
        if self.user is None and self.host not in LOOPBACK:
            raise UserError(
                f"--host {self.host} lets other machines in; add --user NAME and set {PASSWORD}, or leave --host out"
            )
        if self.user is not None and not os.environ.get(PASSWORD):
            raise UserError(f"--user {self.user} needs a password; set the environment variable {PASSWORD}")

    def run(self) -> None:
        """Serve until interrupted."""
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # not all of gradio heeds the page's own setting

        from varkit.cli.listening import address, listen
        from varkit.studio.app import create_app

        models = named_models(self.model)
        login = None if self.user is None else (self.user, os.environ[PASSWORD])
        ports = range(FIRST_PORT, FIRST_PORT + PORTS) if self.port is None else [self.port]
        with listen(self.host, ports) as socket:
            import uvicorn  # which comes with gradio

            app = create_app(models, self.workers, login)
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=SECONDS_TO_FINISH)
            print(f"varkit studio is at {address(socket)} (Ctrl-C ends it)", flush=True)
            uvicorn.Server(config).run(sockets=[socket])
