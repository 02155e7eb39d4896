# The service and its migrations: one image. docs/topology.md states its size and layers as measured.

FROM python:3.13-slim-trixie AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
# No pip in it: the final image gets what runs, not what installs. The base image's own pip fills it.
RUN python -m venv --without-pip /opt/venv
# The lock comes first and alone: a change of code does not install anything again. Wheels only, hence no compiler.
COPY requirements.txt /tmp/requirements.txt
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip --python /opt/venv/bin/python install --no-compile --only-binary :all: --require-hashes \
        --requirement /tmp/requirements.txt
RUN find /opt/venv -depth -type d \( -name tests -o -name test \) -exec rm -r {} + \
 && find /opt/venv -type f \( -name '*.[ch]' -o -name '*.[ch]pp' -o -name '*.px[di]' -o -name '*.pyx' \) -delete \
 && python -m compileall -q --invalidation-mode unchecked-hash /opt/venv
COPY pglifeguard /srv/pglifeguard
COPY app /srv/app
COPY migrations /srv/migrations
COPY alembic.ini /srv/alembic.ini
# Bytecode that does not look at its source's date, because COPY keeps dates and a read-only file system could not renew it.
RUN python -m compileall -q --invalidation-mode unchecked-hash /srv

FROM python:3.13-slim-trixie
# A number, so that an orchestrator can check "not root" without reading the image's /etc/passwd.
RUN groupadd --gid 10001 lifeguard \
 && useradd --uid 10001 --gid lifeguard --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin lifeguard
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
COPY --from=build /opt/venv /opt/venv
COPY --from=build /srv /srv
WORKDIR /srv
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-IS", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=2); c.request('GET', '/health/live'); raise SystemExit(c.getresponse().status != 200)"]
# Exec form: the service is process 1 and gets SIGTERM itself.
ENTRYPOINT ["python", "-m", "app"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
