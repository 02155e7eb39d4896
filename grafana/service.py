"""How the service does for its clients: rate, errors, duration, and how fast the error budget burns."""

from grafana_foundation_sdk.builders.dashboard import TextBoxVariable
from grafana_foundation_sdk.models.dashboard import Dashboard, VariableOption
from grafana_foundation_sdk.models.units import OpsPerSecond, PercentUnit, RequestsPerSecond, Seconds, Short

from grafana.parts import Row, assemble, figure, graph, heat, ratio, states, values_of

RATE = "[$__rate_interval]"
JOB = 'job=~"$job"'
HERE = f'{JOB}, instance=~"$instance"'
OF = f'{HERE}, route=~"$route"'
# An answer of 5xx is an error, a refusal among them; a client that left (499) and a wrong request are not.
REQUESTS = f"sum(rate(http_requests_total{{{OF}}}{RATE}))"
# With no such series yet, nothing has failed.
ERRORS = f'(sum(rate(http_requests_total{{{OF}, status=~"5.."}}{RATE})) or 0 * {REQUESTS})'
LAG = "event_loop_lag_seconds_bucket"
ALLOWED = "(1 - $objective)"
OBJECTIVE = VariableOption(selected=True, text="0.999", value="0.999")


def quantile(share: float, labels: str = "le") -> str:
    """Return the duration that this share of the requests stays below."""
    return f"histogram_quantile({share}, sum by ({labels}) (rate(http_request_seconds_bucket{{{OF}}}{RATE})))"


def burn(window: str) -> str:
    """Return how many times faster than allowed errors came, over a window that ends now: one of the recorded ones."""
    return ratio(f"sum(job:http_requests_failed:ratio_rate{window}{{{JOB}}})", ALLOWED)


def spent(window: str) -> str:
    """Return the part of the allowed errors of any window that came."""
    clients = f'{JOB}, route!~"/health/.*|/metrics"'
    asked = f"sum(rate(http_requests_total{{{clients}}}[{window}]))"
    failed = f'(sum(rate(http_requests_total{{{clients}, status=~"5.."}}[{window}])) or 0 * {asked})'
    return ratio(ratio(failed, asked), ALLOWED)


def dashboard() -> Dashboard:
    """Make it."""
    return assemble(
        "lifeguard-service",
        "Lifeguard: service",
        "Rate, errors and duration of the requests, the error budget, and the process behind them.",
        [
            # The library's own metric tells its jobs from others that count requests under the same name.
            values_of("job", "job", "db_pool_connections_total", every=""),
            values_of("instance", "instance", f"http_requests_in_progress{{{JOB}}}"),
            values_of("route", "route", f"http_requests_total{{{HERE}}}"),
            TextBoxVariable("objective").label("Objective").default_value(str(OBJECTIVE.value)).current(OBJECTIVE),
        ],
        [
            _at_a_glance(),
            _requests(),
            _error_budget(),
            _the_process(),
            _what_is_watched(),
        ],
    )


def _at_a_glance() -> Row:
    return "At a glance", [
        figure(
            1, "Instances that answer",
            "Instances that the last scrape reached. Bad: none. Runbook: ServiceDown.",
            f"sum(up{{{JOB}}}) or vector(0)", unit=Short, limit=("below", 1),
        ),
        figure(
            2, "Requests",
            "Requests a second, of all kinds and outcomes.",
            REQUESTS, unit=RequestsPerSecond,
        ),
        figure(
            3, "Errors",
            "The part of the requests that were answered 5xx. Bad: more than the objective allows. "
            "A refusal (503) counts.",
            ratio(ERRORS, REQUESTS), unit=PercentUnit, limit=("above", 0.001),
        ),
        figure(
            4, "Duration, p99",
            "One request in a hundred takes this long or longer.",
            quantile(0.99), unit=Seconds,
        ),
    ]  # fmt: skip


def _requests() -> Row:
    return "Requests", [
        graph(
            11, "Requests by route",
            "Requests a second. Bad: a step that no release and no campaign explains.",
            (
                f"sum by (method, route) (rate(http_requests_total{{{OF}}}{RATE}))",
                "{{method}} {{route}}",
            ),
            unit=RequestsPerSecond, stacked=True,
        ),
        graph(
            12, "Answers by status",
            "Answers a second. 503 is shedding or a database that is away, 504 a statement past its "
            "timeout, 499 a client that left. Runbook: DatabaseSheddingLoad.",
            (f"sum by (status) (rate(http_requests_total{{{OF}}}{RATE}))", "{{status}}"),
            unit=RequestsPerSecond, stacked=True,
        ),
        graph(
            13, "Errors by route",
            "The part of each route's requests that were answered 5xx. All routes alike: the database, or "
            "a pool that they share. One route: its statements, or what it locks.",
            (
                ratio(
                    f'sum by (route) (rate(http_requests_total{{{OF}, status=~"5.."}}{RATE}))',
                    f"sum by (route) (rate(http_requests_total{{{OF}}}{RATE}))",
                ),
                "{{route}}",
            ),
            unit=PercentUnit,
        ),
        graph(
            14, "Duration",
            "Of all requests, from their first byte to the last of the answer. p50 calm and p99 high: some "
            "wait, for a connection or a lock. Both high: the database is slow. Runbook: SlowQueries.",
            (quantile(0.5), "p50"),
            (quantile(0.95), "p95"),
            (quantile(0.99), "p99"),
            unit=Seconds,
        ),
        graph(
            15, "Duration by route, p99",
            "The route that is slow, where not all are. Bad: a second, for minutes. Runbook: SlowRoute.",
            (quantile(0.99, "route, le"), "{{route}}"),
            unit=Seconds, limit=("above", 1),
        ),
        heat(
            16, "Durations",
            "How many requests took how long. Two bands are two kinds of requests, or a queue before one.",
            f"sum by (le) (increase(http_request_seconds_bucket{{{OF}}}{RATE}))",
            unit=Seconds,
        ),
    ]  # fmt: skip


def _error_budget() -> Row:
    return "Error budget", [
        graph(
            21, "Burn rate",
            "How many times faster than the objective allows errors come, of all instances and routes; probes and "
            "scrapes are left out. At 1 the budget lasts exactly its month. Bad: 14.4 over an hour spends a fiftieth "
            "of it; over five minutes too, it goes on. Runbook: ErrorBudgetBurning.",
            (burn("5m"), "5 minutes"),
            (burn("1h"), "an hour"),
            unit=Short, limit=("above", 14.4),
        ),
        graph(
            23, "Burn rate, slow",
            "The same over hours. Bad: 6 over six hours spends a twentieth of the budget. Runbook: ErrorBudgetBurning.",
            (burn("30m"), "30 minutes"),
            (burn("6h"), "six hours"),
            unit=Short, limit=("above", 6),
        ),
        figure(
            22, "Budget left",
            "The part of the error budget of the time shown that is not spent. Below 0 the objective was missed.",
            f"1 - {spent('$__range')}", unit=PercentUnit, limit=("below", 0),
        ),
    ]  # fmt: skip


def _the_process() -> Row:
    return "The process", [
        graph(
            31, "Requests in progress",
            "Requests being worked on. Bad: one instance with many more than the others is stuck.",
            (f"sum by (instance) (http_requests_in_progress{{{HERE}}})", "{{instance}}"),
            unit=Short,
        ),
        graph(
            32, "Event-loop lag, p99",
            "How late the event loop is for a timer. Bad: tenths of a second, in which nobody on this "
            "instance gets an answer: something computes or blocks in the loop.",
            (f"histogram_quantile(0.99, sum by (instance, le) (rate({LAG}{{{HERE}}}{RATE})))", "{{instance}}"),
            unit=Seconds,
        ),
        graph(
            34, "Event loop late",
            "The part of the time in which the loop was late. One long stop a minute shows here, and in no percentile. "
            "Bad: a fifth; the instance computes more than it serves. Runbook: EventLoopLagging.",
            ('max by (instance) (instance:event_loop_late:ratio_rate2m{instance=~"$instance"})', "{{instance}}"),
            unit=Short, limit=("above", 0.2),
        ),
        graph(
            33, "Connections ended without a request",
            "Clients that sent no whole request in time, or too much, or do not read their answer. Bad: "
            "many that are not your load balancer's.",
            (f"sum by (reason) (rate(http_connections_refused_total{{{HERE}}}{RATE}))", "{{reason}}"),
            unit=OpsPerSecond,
        ),
        graph(
            35, "Requests refused before their route",
            "Requests for a host that is not allowed, and those over RATE_LIMIT_PER_SECOND. Bad: many of one reason, "
            "from clients that are yours.",
            (f"sum by (reason) (rate(http_requests_refused_total{{{HERE}}}{RATE}))", "{{reason}}"),
            unit=RequestsPerSecond,
        ),
    ]  # fmt: skip


def _what_is_watched() -> Row:
    return "What is watched", [
        states(
            41, "Targets",
            "Whether Prometheus reaches each target, and each exporter its server. Runbook: TargetDown, SeriesMissing.",
            ("min by (job, instance, server) (up)", "{{job}} {{server}} {{instance}}"),
            ("min by (job, instance, server) (pg_up)", "PostgreSQL {{server}} {{instance}}"),
            ("min by (job, instance) (pgbouncer_up)", "PgBouncer {{instance}}"),
            names=("down", "up"),
        ),
        graph(
            42, "Instances behind the balancer",
            "Instances that its own probe finds. Bad: none; every request is refused, whatever Prometheus reaches. "
            "Runbook: BalancerWithoutInstances.",
            ("max by (proxy) (haproxy_backend_active_servers)", "{{proxy}}"),
            unit=Short, limit=("below", 0.5),
        ),
    ]  # fmt: skip
