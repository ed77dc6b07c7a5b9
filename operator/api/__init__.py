"""The custom resources as pydantic models: the only source of crds/, defaults and what the code reads."""

from .kvmove import KVMoveSpec, KVMoveStatus
from .llmservice import AutoscalingSpec, DrainSpec, GatewaySpec, LLMServiceSpec, PodTemplate
from .llmservice_status import (
    AgentLine,
    AutoscalingStatus,
    Condition,
    Decision,
    LLMServiceStatus,
    PoolStatus,
    TierPool,
)
from .shared import API_VERSION, GROUP, INT32, LONGEST_NAME, VERSION, Resource, bytes_of, quantity

__all__ = [
    "API_VERSION",
    "GROUP",
    "INT32",
    "LONGEST_NAME",
    "VERSION",
    "AgentLine",
    "AutoscalingSpec",
    "AutoscalingStatus",
    "Condition",
    "Decision",
    "DrainSpec",
    "GatewaySpec",
    "KVMoveSpec",
    "KVMoveStatus",
    "LLMServiceSpec",
    "LLMServiceStatus",
    "PodTemplate",
    "PoolStatus",
    "Resource",
    "TierPool",
    "bytes_of",
    "quantity",
]
