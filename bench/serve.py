"""`python -m bench.serve NAME --port N`: a variant under uvicorn, with the options of `python -m app serve`."""

import argparse

import uvicorn
from uvicorn.supervisors import Multiprocess

GRACEFUL_SECONDS = 5


def main() -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    config = uvicorn.Config(
        f"bench.variants.{arguments.variant}:create_app",
        factory=True,
        host="127.0.0.1",
        port=arguments.port,
        workers=arguments.workers,
        loop="uvloop",
        http="httptools",
        lifespan="on",
        proxy_headers=True,
        forwarded_allow_ips="127.0.0.1",
        timeout_graceful_shutdown=GRACEFUL_SECONDS,
        access_log=False,
        server_header=False,
        # Not the service's own log configuration: its imports would count as every variant's memory.
        log_level="error",
    )
    if arguments.workers > 1:
        Multiprocess(config, sockets=[config.bind_socket()]).run()
    else:
        uvicorn.Server(config).run()


if __name__ == "__main__":
    main()
