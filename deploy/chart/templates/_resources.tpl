{{/*
The kernel counts a map's entries as memory of the container that made the map. For each connection that is an object
of 192 bytes (intercept-common/src/layout/connection.rs) and 16 to 32 of the hash table: 224. The rest is the agent itself, the lists and
routes of its pods, and 320 KiB of counters for each CPU.
*/}}
{{- define "intercept.memory" -}}
{{- $mebi := 1048576 -}}
{{- $connections := mul (int64 .Values.maxConnections) 224 -}}
{{ add 128 (div (add $connections (sub $mebi 1)) $mebi) }}Mi
{{- end }}

{{- define "intercept.resources" -}}
{{- with .Values.resources.requests }}
requests:
  {{- toYaml . | nindent 2 }}
{{- end }}
limits:
  {{- toYaml (merge dict (default dict .Values.resources.limits) (dict "memory" (include "intercept.memory" .))) | nindent 2 }}
{{- end }}
