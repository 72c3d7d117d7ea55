{{/* AppArmor by field since Kubernetes 1.30, by annotation before: exactly one of the two is not empty. */}}
{{- define "intercept.appArmorByField" -}}
{{- if and .Values.appArmorProfile (semverCompare ">=1.30-0" .Capabilities.KubeVersion.Version) -}}
{{ .Values.appArmorProfile }}
{{- end -}}
{{- end }}

{{- define "intercept.appArmorByAnnotation" -}}
{{- if and .Values.appArmorProfile (semverCompare "<1.30-0" .Capabilities.KubeVersion.Version) -}}
{{ ternary "unconfined" "runtime/default" (eq .Values.appArmorProfile "Unconfined") }}
{{- end -}}
{{- end }}

{{- define "intercept.podSecurityContext" -}}
{{- with .Values.seccompProfile }}
seccompProfile: { type: {{ . }} }
{{- end }}
{{- with .Values.seLinuxType }}
seLinuxOptions: { type: {{ . }} }
{{- end }}
{{- end }}
