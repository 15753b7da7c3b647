{{/* The name of all objects. */}}
{{- define "forebay.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The labels by which the pods of a component are found: they never change. Takes (list $ "worker"). */}}
{{- define "forebay.selector" -}}
{{- $ := index . 0 -}}
app.kubernetes.io/name: {{ default $.Chart.Name $.Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ $.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "forebay.labels" -}}
{{- $ := index . 0 -}}
{{ include "forebay.selector" . }}
app.kubernetes.io/version: {{ $.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $.Chart.Name $.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "forebay.image" -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}

{{/* The image of workers: it has the code of the application; so the autoscaler does not need it. */}}
{{- define "forebay.workerImage" -}}
{{- $own := .Values.worker.image -}}
{{- printf "%s:%s" (default .Values.image.repository $own.repository) (default (default .Chart.AppVersion .Values.image.tag) $own.tag) -}}
{{- end -}}

{{/* What all pods have: nobody is root, nothing is written but /tmp. */}}
{{- define "forebay.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "forebay.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Where pods of a component may run. Takes its values. */}}
{{- define "forebay.scheduling" -}}
{{- range $key := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
{{- with get $ $key }}
{{ $key }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "forebay.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* FOREBAY_OVERFLOW, the URL of the overflow, for the containers of workers and of the autoscaler. */}}
{{- define "forebay.overflowEnv" -}}
{{- $overflow := .Values.overflow -}}
{{- if .Values.redis.enabled -}}
- name: REDIS_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ required "redis.password.secretName is needed: kubectl create secret generic NAME --from-literal=password=$(openssl rand -hex 32)" .Values.redis.password.secretName }}
      key: {{ .Values.redis.password.key }}
- name: FOREBAY_OVERFLOW
  value: redis://:$(REDIS_PASSWORD)@{{ include "forebay.fullname" . }}-redis:6379/0
{{- else if $overflow.secret.name -}}
- name: FOREBAY_OVERFLOW
  valueFrom:
    secretKeyRef:
      name: {{ $overflow.secret.name }}
      key: {{ $overflow.secret.key }}
{{- else -}}
- name: FOREBAY_OVERFLOW
  value: {{ required "overflow.url or overflow.secret.name is needed without redis.enabled" $overflow.url | quote }}
{{- end }}
{{- end -}}

{{/* FOREBAY_SHARED, the URL of the store of the gateways' limits. */}}
{{- define "forebay.sharedEnv" -}}
{{- $secret := .Values.gateway.shared.secret -}}
{{- if $secret.name -}}
- name: FOREBAY_SHARED
  valueFrom:
    secretKeyRef:
      name: {{ $secret.name }}
      key: {{ $secret.key }}
{{- else if .Values.redis.enabled -}}
- name: REDIS_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ required "redis.password.secretName is needed: kubectl create secret generic NAME --from-literal=password=$(openssl rand -hex 32)" .Values.redis.password.secretName }}
      key: {{ .Values.redis.password.key }}
- name: FOREBAY_SHARED
  value: redis://:$(REDIS_PASSWORD)@{{ include "forebay.fullname" . }}-redis:6379/0
{{- else -}}
{{- fail "gateway.shared.secret.name is needed without redis.enabled: a secret that holds the URL of a Redis" -}}
{{- end }}
{{- end -}}

{{/* The configuration of `forebay autoscale`. Strings, numbers and lists are the same in TOML and in JSON. */}}
{{- define "forebay.autoscaleConfig" -}}
{{- $name := include "forebay.fullname" . -}}
{{- with .Values.autoscaler -}}
[autoscaler]
overflow_env = "FOREBAY_OVERFLOW"
task_types = {{ mustToRawJson .taskTypes }}
seats = {{ int .seats }}
load = {{ .load }}
minimum = {{ int .minimum }}
maximum = {{ int .maximum }}
interval = {{ .interval }}
window = {{ .window }}
panic_window = {{ .panicWindow }}
stabilization = {{ .stabilization }}
{{- with .serviceSeconds }}
service = {{ . }}
{{- end }}
{{- if .publishOnly }}
publish_only = true
{{- end }}

[target.kubernetes]
workload = "deployment/{{ $name }}-worker"
namespace = "{{ $.Release.Namespace }}"
report_port = {{ int $.Values.worker.port }}
{{- if not .publishOnly }}

[leader.kubernetes]
name = "{{ $name }}-autoscaler"
namespace = "{{ $.Release.Namespace }}"
{{- end }}
{{- end -}}
{{- end -}}

{{/*
Probes of a process that answers /healthz while it lives, and /readyz while it takes tasks. It is killed if it has not
answered for two minutes: by then its tasks have gone to others.
*/}}
{{- define "forebay.ownProbes" -}}
startupProbe:
  httpGet: {path: /healthz, port: {{ . }}}
  periodSeconds: 2
  failureThreshold: 60
readinessProbe:
  httpGet: {path: /readyz, port: {{ . }}}
  periodSeconds: 5
  timeoutSeconds: 3
livenessProbe:
  httpGet: {path: /healthz, port: {{ . }}}
  periodSeconds: 20
  timeoutSeconds: 10
  failureThreshold: 6
{{- end -}}
