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
REFUSED = "Refused"
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
