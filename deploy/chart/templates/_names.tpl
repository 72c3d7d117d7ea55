{{/* The labels that select the DaemonSet's pods. */}}
{{- define "intercept.selector" -}}
app.kubernetes.io/name: intercept
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "intercept.labels" -}}
{{ include "intercept.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "intercept.image" -}}
{{- if .Values.image.digest -}}
{{ printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else -}}
{{ printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) }}
{{- end -}}
{{- end }}

{{/* What the kubelet dials: the address that is listened on, or this node's own if it is every one. */}}
{{- define "intercept.probeHost" -}}
{{- $address := trimAll "[]" .Values.metrics.address -}}
{{- if has $address (list "0.0.0.0" "::") -}}
{{ ternary "127.0.0.1" "\"::1\"" (eq $address "0.0.0.0") }}
{{- else -}}
{{ $address | quote }}
{{- end -}}
{{- end }}
