"""The reasons in conditions and decisions, which scripts and alerts rely on: CamelCase, and never changed."""

from __future__ import annotations

# Why an agent comes or goes.
SCALE_OUT = "ScaleOut"
SCALE_IN = "ScaleIn"
ROLLOUT = "Rollout"
NODE_CORDONED = "NodeCordoned"
NODE_NOT_READY = "NodeNotReady"
NODE_LOST = "NodeLost"
AGENT_FAILED = "AgentFailed"
AGENT_LEAVING = "AgentLeaving"  # it drains or terminates, and not because of a decision of the operator
SERVICE_DELETED = "ServiceDeleted"

# Why the number of agents is changed.
KV_LOAD = "KVLoad"  # by the KV blocks that running and waiting requests need
REQUEST_LOAD = "RequestLoad"  # by the sequence slots that they need
MIN_REPLICAS = "MinReplicas"
MAX_REPLICAS = "MaxReplicas"

# Why conditions are what they are.
ALL_READY = "AllReady"
SCALED_TO_ZERO = "ScaledToZero"
INVALID_SPEC = "InvalidSpec"
PAUSED = "Paused"
DELETING = "Deleting"
REFUSED = "Refused"  # by the API server, and none of the following
QUOTA_EXCEEDED = "QuotaExceeded"
LIMITS_MISSING = "LimitsMissing"  # a quota demands requests or limits that the pod does not have
LIMIT_RANGE_VIOLATED = "LimitRangeViolated"
POD_SECURITY_VIOLATED = "PodSecurityViolated"
POLICY_DENIED = "PolicyDenied"  # by a ValidatingAdmissionPolicy
WEBHOOK_DENIED = "WebhookDenied"
WEBHOOK_UNAVAILABLE = "WebhookUnavailable"
SERVICE_ACCOUNT_MISSING = "ServiceAccountMissing"
PRIORITY_CLASS_MISSING = "PriorityClassMissing"
RUNTIME_CLASS_MISSING = "RuntimeClassMissing"
KIND_MISSING = "KindMissing"  # the cluster does not have a kind of object, such as ServiceMonitor
RIGHTS_MISSING = "RightsMissing"  # the operator's own
NAMESPACE_TERMINATING = "NamespaceTerminating"
OBJECT_TOO_LARGE = "ObjectTooLarge"
INTERNAL_ERROR = "InternalError"  # a defect of the operator
NAME_TAKEN = "NameTaken"  # an object that is not ours has a name that the service needs
PROTECTION_MISSING = "ProtectionMissing"  # a budget, policy or Service is not there, and could not be mended
REPORTS_UNREADABLE = "ReportsUnreadable"  # an agent runs, and its status cannot be read
UNSCHEDULABLE = "Unschedulable"
AGENTS_NOT_READY = "AgentsNotReady"
GATEWAY_NOT_READY = "GatewayNotReady"
SCALING = "Scaling"
ROLLING_OUT = "RollingOut"
REPLACING = "Replacing"
DRAINING = "Draining"
STABLE = "Stable"
HEALTHY = "Healthy"
IN_BALANCE = "InBalance"
OUT_OF_BALANCE = "OutOfBalance"
NO_REPORTS = "NoReports"
