{{- define "blockyard.name" -}}
{{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* Name of all objects: the release's name and the chart's name, once if the first contains the second. */}}
{{- define "blockyard.fullname" -}}
{{- $name := include "blockyard.name" . -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains $name .Release.Name -}}
{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" }}
{{- end -}}
{{- end }}

{{- define "blockyard.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{ .Values.serviceAccount.name | default (include "blockyard.fullname" .) }}
{{- else -}}
{{ required "serviceAccount.name: name the ServiceAccount, as serviceAccount.create is false" .Values.serviceAccount.name }}
{{- end -}}
{{- end }}

{{/* Selectors are immutable, so these labels must be the same in every version of the chart. */}}
{{- define "blockyard.selectorLabels" -}}
app.kubernetes.io/name: blockyard
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "blockyard.labels" -}}
{{ include "blockyard.selectorLabels" . }}
app.kubernetes.io/part-of: blockyard
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* An image by digest if there is one, else by tag. Takes a list: the image's values, and the chart's root. */}}
{{- define "blockyard.image" -}}
{{- $image := index . 0 -}}
{{- $root := index . 1 -}}
{{ $image.repository }}{{ if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default $root.Chart.AppVersion }}{{ end }}
{{- end }}
