"""The service as a process of its own that tells, beside everything else, what it keeps in memory: GET /inside.

`python -m tests.chaos.inside --port 8001` serves as `python -m app serve` does.
"""

import asyncio
import gc
import sys

from fastapi import FastAPI

from app import main
from app.logs import log_config
from app.settings import Settings
from pglifeguard import serving


def create_app() -> FastAPI:
    """Build the service with one more route."""
    app = main.create_app()

    @app.get("/inside")
    async def get_inside() -> dict[str, int]:
        """Count what lives; what only waits for its collection is collected first."""
        gc.collect()
        return {"blocks": sys.getallocatedblocks(), "tasks": len(asyncio.all_tasks())}

    return app


if __name__ == "__main__":
    settings = Settings()
    serving.serve(
        "tests.chaos.inside:create_app",
        settings,
        port=int(sys.argv[sys.argv.index("--port") + 1]),
        access_log=False,
        log_config=log_config(settings.log_level, as_json=True, access_log=False),
    )
