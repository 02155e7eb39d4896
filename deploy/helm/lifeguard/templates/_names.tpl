{{/* Names and labels. A release called "lifeguard" gives objects of that name; any other one gets "-lifeguard" behind it. */}}
{{- define "lifeguard.name" -}}
{{- $name := ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) (contains .Chart.Name .Release.Name) -}}
{{- /* The operator makes names of up to 18 characters more out of it. */ -}}
{{- $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "lifeguard.database" -}}{{ include "lifeguard.name" . }}-db{{- end -}}

{{- define "lifeguard.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "lifeguard.labels" -}}
{{ include "lifeguard.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "lifeguard.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{/* A value as text. Helm reads every number of a file as a float, and would write ten million as 1e+07. */}}
{{- define "lifeguard.text" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ int64 . }}{{ else }}{{ toString . }}{{ end -}}
{{- end -}}
