{{/*
The logins as one map: primary, replica, migrations, listen, admin, each with `urls` (without passwords, empty where a Secret
has them), `urlSecret`, `passwordSecret` and `count`. Of a database that is there, what .Values.database says; of a cluster of
ours, the names that the operator gives its services. JSON, because a template returns text.
*/}}
{{- define "lifeguard.logins" -}}
{{- $none := dict "name" "" "key" "" -}}
{{- $logins := dict -}}
{{- if .Values.cluster.enabled -}}
  {{- $db := include "lifeguard.database" . -}}
  {{- $rw := printf "%s-%s" $db (ternary "pooler-rw" "rw" .Values.cluster.pooler.enabled) -}}
  {{- $ro := printf "%s-%s" $db (ternary "pooler-ro" "ro" .Values.cluster.pooler.enabled) -}}
  {{- $tls := "sslmode=verify-full&sslrootcert=/run/certificates/ca.crt" -}}
  {{- range $login := list
      (list "primary" "app_rw" $rw)
      (list "replica" "app_ro" (ternary $ro "" (gt (int .Values.cluster.instances) 1)))
      (list "migrations" "app_owner" (printf "%s-rw" $db)) -}}
    {{- $role := index $login 1 -}}
    {{- $host := index $login 2 -}}
    {{- $urls := ternary (list) (list (printf "postgresql://%s@%s:5432/lifeguard?%s" $role $host $tls)) (empty $host) -}}
    {{- $password := dict "name" $.Values.cluster.passwordsSecret "key" $role -}}
    {{- $_ := set $logins (index $login 0) (dict "urls" $urls "urlSecret" $none "passwordSecret" $password "count" (len $urls)) -}}
  {{- end -}}
  {{- $_ := set $logins "listen" (dict "urls" (list) "urlSecret" $none "passwordSecret" $none "count" 0) -}}
  {{- $_ := set $logins "admin" (dict "urls" (list) "urlSecret" $none "passwordSecret" $none "count" 0) -}}
{{- else -}}
  {{- $given := .Values.database -}}
  {{- $admin := ternary .Values.pgbouncer.admin (dict "url" "" "urlSecret" $none "passwordSecret" $none) .Values.pgbouncer.enabled -}}
  {{- range $name, $login := dict "primary" $given.primary "replica" $given.replica "migrations" $given.migrations "listen" $given.listen "admin" $admin -}}
    {{- $urls := ternary $login.urls (compact (list $login.url)) (eq $name "replica") -}}
    {{- $secret := ternary $none $login.urlSecret (not (empty $urls)) -}}
    {{- $count := ternary (len $urls) (ternary (int ($login.count | default 1)) 0 (not (empty $secret.name))) (not (empty $urls)) -}}
    {{- $_ := set $logins $name (dict "urls" $urls "urlSecret" $secret "passwordSecret" $login.passwordSecret "count" $count) -}}
  {{- end -}}
{{- end -}}
{{- toJson $logins -}}
{{- end -}}

{{/* Host and port of a URL, by which pools are added up, as pglifeguard/database_url.py does. */}}
{{- define "lifeguard.server" -}}
{{- $hosts := regexReplaceAll "^[a-z+]+://(?:[^@/?]*@)?([^/?]*).*$" . "${1}" -}}
{{- $servers := list -}}
{{- range splitList "," $hosts -}}
  {{- $servers = append $servers (ternary . (printf "%s:5432" .) (regexMatch ":[0-9]+$" .)) -}}
{{- end -}}
{{- join "," $servers -}}
{{- end -}}
