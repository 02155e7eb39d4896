{{/*
The environment of the service. What is no secret goes into a ConfigMap; secrets are files below /run/secrets/lifeguard, and
their variables name these files. A password file is read at each connect, so a Secret may change while the service runs.
*/}}
{{- define "lifeguard.environment" -}}
{{- include "lifeguard.check" . -}}
{{- $v := .Values -}}
{{- $logins := include "lifeguard.logins" . | fromJson -}}
{{- $budget := include "lifeguard.budget" . | fromJson -}}
{{- $env := dict
    "ENVIRONMENT" $v.environment
    "WORKERS" $v.workers
    "INSTANCES" $budget.instances
    "SURGE_INSTANCES" $budget.surge
    "CONNECTION_LIMIT" $budget.limit
    "CONNECTION_RESERVE" $v.budget.reserved
    "MIGRATION_CONNECTIONS" $budget.migrations
    "JOB_CONNECTIONS" $budget.jobs
    "DATABASE_POOL_SIZE" $v.pools.primary.size
    "DATABASE_MAX_OVERFLOW" $v.pools.primary.maxOverflow
    "DATABASE_ANALYTICS_POOL_SIZE" $v.pools.analytics.size
    "DATABASE_ANALYTICS_MAX_OVERFLOW" $v.pools.analytics.maxOverflow
    "DRAIN_DELAY_SECONDS" $v.shutdown.drainDelaySeconds
    "GRACEFUL_TIMEOUT_SECONDS" $v.shutdown.gracefulTimeoutSeconds -}}
{{- if gt (int $logins.replica.count) 0 -}}
  {{- $_ := set $env "DATABASE_REPLICA_POOL_SIZE" $v.pools.replica.size -}}
  {{- $_ := set $env "DATABASE_REPLICA_MAX_OVERFLOW" $v.pools.replica.maxOverflow -}}
{{- end -}}
{{- range $file, $secret := include "lifeguard.serviceSecrets" . | fromJson -}}
  {{- if $secret.name }}{{ $_ := set $env (printf "%s_FILE" (upper $file)) (printf "/run/secrets/lifeguard/%s" $file) }}{{ end -}}
{{- end -}}
{{- $env = merge $env (include "lifeguard.loginVariables" (list $logins "primary" "replica" "listen") | fromJson) -}}
{{- range $name, $value := $v.settings }}{{ $_ := set $env $name $value }}{{ end -}}
{{- range $name, $value := $env }}
{{ $name }}: {{ include "lifeguard.text" $value | quote }}
{{- end -}}
{{- end -}}

{{/* The Secrets of the service beside those of its logins, as JSON, each by its file, which is its variable in small. */}}
{{- define "lifeguard.serviceSecrets" -}}
{{- $v := .Values -}}
{{- dict "auth_secret" $v.authSecret "auth_accepted_secrets" $v.authAcceptedSecrets "idempotency_secret" $v.idempotencySecret | toJson -}}
{{- end -}}

{{/* The variables of some logins, as JSON: a URL, or the file that has it, and the file of the password. */}}
{{- define "lifeguard.loginVariables" -}}
{{- $logins := first . -}}
{{- $prefixes := dict "primary" "DATABASE" "replica" "DATABASE_REPLICA" "migrations" "MIGRATIONS" "listen" "LISTEN" "admin" "PGBOUNCER_ADMIN" -}}
{{- $env := dict -}}
{{- range rest . -}}
  {{- $login := get $logins . -}}
  {{- $prefix := get $prefixes . -}}
  {{- $file := printf "/run/secrets/lifeguard/%s" (lower $prefix) -}}
  {{- if $login.urls }}{{ $_ := set $env (printf "%s_URL" $prefix) (join "," $login.urls) }}{{ end -}}
  {{- if $login.urlSecret.name }}{{ $_ := set $env (printf "%s_URL_FILE" $prefix) (printf "%s_url" $file) }}{{ end -}}
  {{- if $login.passwordSecret.name }}{{ $_ := set $env (printf "%s_PASSWORD_FILE" $prefix) (printf "%s_password" $file) }}{{ end -}}
{{- end -}}
{{- toJson $env -}}
{{- end -}}

{{/* The volumes of a pod: the Secrets of these logins as files, the authority, and a folder that can be written. */}}
{{- define "lifeguard.volumes" -}}
{{- $root := first . -}}
{{- $v := $root.Values -}}
{{- $logins := include "lifeguard.logins" $root | fromJson -}}
{{- $prefixes := dict "primary" "database" "replica" "database_replica" "migrations" "migrations" "listen" "listen" "admin" "pgbouncer_admin" -}}
{{- $sources := list -}}
{{- range rest . -}}
  {{- if eq . "auth" -}}
    {{- range $file, $secret := include "lifeguard.serviceSecrets" $root | fromJson -}}
      {{- if $secret.name }}{{ $sources = append $sources (dict "name" $secret.name "key" $secret.key "path" $file) }}{{ end -}}
    {{- end -}}
  {{- else -}}
    {{- $login := get $logins . -}}
    {{- $prefix := get $prefixes . -}}
    {{- range $kind := list "url" "password" -}}
      {{- $secret := get $login (printf "%sSecret" $kind) -}}
      {{- if $secret.name }}{{ $sources = append $sources (dict "name" $secret.name "key" $secret.key "path" (printf "%s_%s" $prefix $kind)) }}{{ end -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
- name: secrets
  projected:
    defaultMode: 0440
    {{- if not $sources }}
    sources: []
    {{- else }}
    sources:
      {{- range $sources }}
      - secret:
          name: {{ .name }}
          items: [{key: {{ .key | quote }}, path: {{ .path }}}]
      {{- end }}
    {{- end }}
{{- with include "lifeguard.authority" $root | fromJson }}
- name: certificates
  secret:
    secretName: {{ .name }}
    defaultMode: 0444
    # Nothing else of it: beside the certificate the operator keeps the authority's key.
    items: [{key: {{ .key | quote }}, path: ca.crt}]
{{- end }}
# Python's temporary files, and the metrics of several workers (PROMETHEUS_MULTIPROC_DIR).
- name: tmp
  emptyDir: {medium: Memory, sizeLimit: 64Mi}
{{- end -}}

{{- define "lifeguard.mounts" -}}
- {name: secrets, mountPath: /run/secrets/lifeguard, readOnly: true}
{{- if include "lifeguard.authority" . | fromJson }}
- {name: certificates, mountPath: /run/certificates, readOnly: true}
{{- end }}
- {name: tmp, mountPath: /tmp}
{{- end -}}

{{- define "lifeguard.authority" -}}
{{- if .Values.cluster.enabled -}}
{{- dict "name" (printf "%s-ca" (include "lifeguard.database" .)) "key" "ca.crt" | toJson -}}
{{- else if .Values.database.caSecret.name -}}
{{- toJson .Values.database.caSecret -}}
{{- else -}}
{}
{{- end -}}
{{- end -}}

{{/* Restricted, by the Pod Security Standards. The group is the one that may read the Secrets. */}}
{{- define "lifeguard.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "lifeguard.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/*
Seconds from SIGTERM to SIGKILL: readiness says no and the port stays open; requests in flight are finished; ten seconds are
for closing the pools, and for a machine that is busy with others.
*/}}
{{- define "lifeguard.terminationSeconds" -}}
{{- add (int .Values.shutdown.drainDelaySeconds) (int .Values.shutdown.gracefulTimeoutSeconds) 10 -}}
{{- end -}}
