{{/*
The arithmetic of connections, as pglifeguard/budget.py has it (tests/deploy compares the two, word for word):

    workers x (instances + surge) x (pool_size + max_overflow + 1) + migrations + jobs  <=  granted - reserved

`instances` is the most that run: autoscaling.maxReplicas, or replicas. `surge` is twice rollout.maxSurge: a rollout starts
so many before it ends as many old ones, and those that end keep their connections until they have. minReadySeconds is as
long as an instance may take to end, so no third lot comes in between.

With a pooler the service's connections are the pooler's clients, and a second sum says what the pooler opens on the server.
Returns JSON: instances, surge, limit, migrations, jobs, demands, and pooler with `server` and `size`.
*/}}
{{- define "lifeguard.budget" -}}
{{- $v := .Values -}}
{{- $logins := include "lifeguard.logins" . | fromJson -}}
{{- $workers := int $v.workers -}}
{{- $instances := int (ternary $v.autoscaling.maxReplicas $v.replicas $v.autoscaling.enabled) -}}
{{- $surge := mul 2 (int $v.rollout.maxSurge) | int -}}
{{- $pooled := or $v.pgbouncer.enabled (and $v.cluster.enabled $v.cluster.pooler.enabled) -}}
{{- $direct := add (ternary 1 0 $v.migrations.enabled) (int $v.budget.jobs) | int -}}

{{- /* The servers in the order of the settings, each with its terms and their sum. */ -}}
{{- $order := list -}}
{{- $terms := dict -}}
{{- $sums := dict -}}
{{- $of := dict "primary" (list "the server of the primary's Secret") "replica" (list) "listen" (list) -}}
{{- range $name, $login := pick $logins "primary" "replica" "listen" -}}
  {{- $servers := list -}}
  {{- range $login.urls }}{{ $servers = append $servers (include "lifeguard.server" .) }}{{ end -}}
  {{- if and (empty $login.urls) $login.urlSecret.name -}}
    {{- range $i := until (int $login.count) -}}
      {{- $servers = append $servers (ternary "the server of the primary's Secret" (printf "the server of the replica's Secret, URL %d" (add1 $i)) (ne $name "replica")) -}}
    {{- end -}}
  {{- end -}}
  {{- $_ := set $of $name $servers -}}
{{- end -}}
{{- $pools := list (list (first $of.primary) $v.pools.primary) -}}
{{- range $of.replica }}{{ $pools = append $pools (list . $v.pools.replica) }}{{ end -}}
{{- $pools = append $pools (list (first (concat $of.replica $of.primary)) $v.pools.analytics) -}}
{{- range $pools -}}
  {{- $server := first . -}}
  {{- $pool := last . -}}
  {{- if not (has $server $order) }}{{ $order = append $order $server }}{{ end -}}
  {{- $_ := set $terms $server (append (get $terms $server | default list) (printf "(%d + %d + 1)" (int $pool.size) (int $pool.maxOverflow))) -}}
  {{- $_ := set $sums $server (add (get $sums $server | default 0) (int $pool.size) (int $pool.maxOverflow) 1) -}}
{{- end -}}
{{- range $of.listen -}}
  {{- if not (has . $order) }}{{ $order = append $order . }}{{ end -}}
  {{- $_ := set $terms . (append (get $terms . | default list) "1 that listens") -}}
  {{- $_ := set $sums . (add (get $sums . | default 0) 1) -}}
{{- end -}}

{{- $limit := int $v.budget.maxConnections -}}
{{- if $v.pgbouncer.enabled }}{{ $limit = int $v.pgbouncer.maxClientConn }}{{ end -}}
{{- if and $v.cluster.enabled $v.cluster.pooler.enabled }}{{ $limit = int $v.cluster.pooler.maxClientConn }}{{ end -}}
{{- $migrations := ternary 0 (ternary 1 0 $v.migrations.enabled) $pooled -}}
{{- $jobs := ternary 0 (int $v.budget.jobs) $pooled -}}
{{- $demands := list -}}
{{- range $server := $order -}}
  {{- $these := get $terms $server -}}
  {{- $each := ternary (first $these) (printf "(%s)" (join " + " $these)) (eq (len $these) 1) -}}
  {{- $many := ternary (printf "(%d + %d surge)" $instances $surge) (toString $instances) (gt $surge 0) -}}
  {{- $arithmetic := printf "%d workers x %s instances x %s" $workers $many $each -}}
  {{- $wanted := mul $workers (add $instances $surge) (get $sums $server) -}}
  {{- if eq $server (first $of.primary) -}}
    {{- if $migrations }}{{ $arithmetic = printf "%s + %d for migrations" $arithmetic $migrations }}{{ end -}}
    {{- if $jobs }}{{ $arithmetic = printf "%s + %d for jobs" $arithmetic $jobs }}{{ end -}}
    {{- $wanted = add $wanted $migrations $jobs -}}
  {{- end -}}
  {{- $demands = append $demands (dict "server" $server "arithmetic" $arithmetic "wanted" $wanted) -}}
{{- end -}}

{{- /* What a pooler opens on the server, beside what goes past it. */ -}}
{{- $pooler := dict -}}
{{- $left := sub (sub (int $v.budget.maxConnections) (int $v.budget.reserved)) $direct -}}
{{- $past := printf "%d of max_connections - %d reserved - %d for migrations and jobs" (int $v.budget.maxConnections) (int $v.budget.reserved) $direct -}}
{{- if $v.pgbouncer.enabled -}}
  {{- $wanted := mul (int $v.pgbouncer.instances) (int $v.pgbouncer.maxDbConnections) -}}
  {{- $pooler = dict "size" (int $v.pgbouncer.maxDbConnections) "wanted" $wanted "left" $left
      "arithmetic" (printf "%d PgBouncers x %d max_db_connections" (int $v.pgbouncer.instances) (int $v.pgbouncer.maxDbConnections)) "past" $past -}}
{{- else if $pooled -}}
  {{- /* Each kind has one instance more while the operator replaces them. Each instance opens as many connections for
  requests as for looking passwords up, at worst. A replica that is promoted keeps those that the ro poolers had opened. */ -}}
  {{- $kinds := ternary 2 1 (gt (int $logins.replica.count) 0) -}}
  {{- $many := mul $kinds (add1 (int $v.cluster.pooler.instances)) -}}
  {{- $size := div $left (mul 2 $many) -}}
  {{- $pooler = dict "size" $size "wanted" (mul 2 $many $size) "left" $left
      "arithmetic" (printf "%d kinds x (%d + 1) poolers x 2 x %d default_pool_size" $kinds (int $v.cluster.pooler.instances) $size) "past" $past -}}
{{- end -}}
{{- toJson (dict "instances" $instances "surge" $surge "limit" $limit "migrations" $migrations "jobs" $jobs "demands" $demands "pooler" $pooler) -}}
{{- end -}}

{{/* End with a sentence when the values contradict each other, or the sum does not fit. */}}
{{- define "lifeguard.check" -}}
{{- $v := .Values -}}
{{- if not $v.cluster.enabled -}}
  {{- if and (empty $v.database.primary.url) (empty $v.database.primary.urlSecret.name) -}}
    {{- fail "\n\nNo database: set database.primary.url and passwordSecret, or database.primary.urlSecret, or cluster.enabled=true." -}}
  {{- end -}}
  {{- if and $v.migrations.enabled (empty $v.database.migrations.url) (empty $v.database.migrations.urlSecret.name) -}}
    {{- fail "\n\nNothing says where to migrate: set database.migrations.url and passwordSecret, or its urlSecret: the primary, past any pooler, as the role that owns the tables. Or set migrations.enabled=false." -}}
  {{- end -}}
{{- else -}}
  {{- if or $v.database.primary.url $v.database.replica.urls $v.database.migrations.url $v.database.listen.url $v.pgbouncer.enabled -}}
    {{- fail "\n\ncluster.enabled=true and a URL under `database`, or pgbouncer.enabled=true: the chart makes the first, the others lead to a database that is there. Keep one of them." -}}
  {{- end -}}
  {{- if not $v.migrations.enabled -}}
    {{- fail "\n\ncluster.enabled=true with migrations.enabled=false: that job makes the roles too, and nobody could log in." -}}
  {{- end -}}
  {{- if and $v.cluster.backup.enabled (empty $v.cluster.backup.objectStore) -}}
    {{- fail "\n\ncluster.backup.enabled=true without cluster.backup.objectStore: name the ObjectStore to back up to." -}}
  {{- end -}}
  {{- if and $v.cluster.restore.enabled (or (empty $v.cluster.restore.objectStore) (empty $v.cluster.restore.serverName)) -}}
    {{- fail "\n\ncluster.restore.enabled=true needs cluster.restore.objectStore and serverName: where the backup is, and the Cluster that wrote it." -}}
  {{- end -}}
{{- end -}}
{{- if and $v.autoscaling.enabled (gt (int $v.autoscaling.minReplicas) (int $v.autoscaling.maxReplicas)) -}}
  {{- fail (printf "\n\nautoscaling.minReplicas %d > maxReplicas %d." (int $v.autoscaling.minReplicas) (int $v.autoscaling.maxReplicas)) -}}
{{- end -}}
{{- $statement := float64 (get $v.settings "STATEMENT_TIMEOUT_SECONDS" | default 30) -}}
{{- if le (float64 $v.shutdown.gracefulTimeoutSeconds) $statement -}}
  {{- fail (printf "\n\nshutdown.gracefulTimeoutSeconds %d <= STATEMENT_TIMEOUT_SECONDS %v: a statement in flight would be cut at the end of an instance. Raise the first." (int $v.shutdown.gracefulTimeoutSeconds) $statement) -}}
{{- end -}}
{{- $noticed := mul (int $v.probes.readiness.periodSeconds) (int $v.probes.readiness.failureThreshold) -}}
{{- if lt (int $v.shutdown.drainDelaySeconds) (int $noticed) -}}
  {{- fail (printf "\n\nshutdown.drainDelaySeconds %d < %d seconds until readiness has failed (probes.readiness: periodSeconds x failureThreshold): requests would be sent to a closed port. Raise the first." (int $v.shutdown.drainDelaySeconds) (int $noticed)) -}}
{{- end -}}
{{- $budget := include "lifeguard.budget" . | fromJson -}}
{{- range $budget.demands -}}
  {{- if gt (int .wanted) (sub (int $budget.limit) (int $v.budget.reserved) | int) -}}
    {{- fail (printf "\n\nThe connections do not fit. %s would get %s = %d connections > %d - %d reserved. Lower pools, workers, replicas, autoscaling.maxReplicas or rollout.maxSurge, put a pooler in between, or raise what the server grants. (The 1 is the connection that watches the database.)" .server .arithmetic (int .wanted) (int $budget.limit) (int $v.budget.reserved)) -}}
  {{- end -}}
{{- end -}}
{{- if $budget.pooler -}}
  {{- if or (gt (int $budget.pooler.wanted) (int $budget.pooler.left)) (lt (int $budget.pooler.size) 1) -}}
    {{- fail (printf "\n\nThe pooler does not fit: %s = %d server connections > %d left (%s). Lower the pooler's instances or size, or raise budget.maxConnections." $budget.pooler.arithmetic (int $budget.pooler.wanted) (int $budget.pooler.left) $budget.pooler.past) -}}
  {{- end -}}
{{- end -}}
{{- end -}}
