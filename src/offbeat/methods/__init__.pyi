"""The methods as a type checker sees them: written by tests/test_types.py."""
# ruff: noqa: I001, RUF022

from ..core.method import Method
from .ad_psgd import ADPSGD as ADPSGD
from .all_reduce import AllReduce as AllReduce
from .asgd import ASGD as ASGD
from .async_adam import AsyncAdam as AsyncAdam
from .async_local_sgd import AsyncLocalSGD as AsyncLocalSGD
from .async_local_sgd import DelayedNesterov as DelayedNesterov
from .async_local_sgd import DyLU as DyLU
from .async_local_sgd import FedBuff as FedBuff
from .backup_workers import BackupWorkers as BackupWorkers
from .bmuf import BMUF as BMUF
from .bmuf import NesterovBMUF as NesterovBMUF
from .d_psgd import DPSGD as DPSGD
from .dana import DanaDC as DanaDC
from .dana import DanaSlim as DanaSlim
from .dana import DanaZero as DanaZero
from .dc_asgd import AdaptiveDelayCompensation as AdaptiveDelayCompensation
from .dc_asgd import DCASGD as DCASGD
from .dc_asgd import DelayCompensation as DelayCompensation
from .diloco import DiLoCo as DiLoCo
from .downpour import Downpour as Downpour
from .easgd import EAMSGD as EAMSGD
from .easgd import EASGD as EASGD
from .gap_aware import AppliedGapPenalty as AppliedGapPenalty
from .gap_aware import DanaGA as DanaGA
from .gap_aware import GapAware as GapAware
from .gap_aware import GapAwareAdam as GapAwareAdam
from .gap_aware import GapPenalty as GapPenalty
from .gap_aware import GlobalGapPenalty as GlobalGapPenalty
from .gem import GEM as GEM
from .go_sgd import GoSGD as GoSGD
from .gossiping_sgd import PullGossip as PullGossip
from .gossiping_sgd import PushGossip as PushGossip
from .gossiping_sgd import SyncPullGossip as SyncPullGossip
from .gossiping_sgd import SyncPushGossip as SyncPushGossip
from .hierarchical import GroupSGD as GroupSGD
from .hierarchical import HierarchicalSGD as HierarchicalSGD
from .local_sgd import LocalSGD as LocalSGD
from .local_sgd import PostLocalSGD as PostLocalSGD
from .lwp import LWP as LWP
from .multi_asgd import MultiASGD as MultiASGD
from .nag_asgd import NAGASGD as NAGASGD
from .overlap import Overlap as Overlap
from .rounded import Rounded as Rounded
from .sgp import OSGP as OSGP
from .sgp import SGP as SGP
from .slowmo import SlowMo as SlowMo
from .slowmo import SlowMoNoAverage as SlowMoNoAverage
from .ssp import SSP as SSP
from .staleness_aware import StalenessAware as StalenessAware
from .staleness_aware import StalenessPenalty as StalenessPenalty

__all__ = [
    "ADPSGD",
    "ASGD",
    "AdaptiveDelayCompensation",
    "AllReduce",
    "AppliedGapPenalty",
    "AsyncAdam",
    "AsyncLocalSGD",
    "BMUF",
    "BackupWorkers",
    "DCASGD",
    "DPSGD",
    "DanaDC",
    "DanaGA",
    "DanaSlim",
    "DanaZero",
    "DelayCompensation",
    "DelayedNesterov",
    "DiLoCo",
    "Downpour",
    "DyLU",
    "EAMSGD",
    "EASGD",
    "FedBuff",
    "GEM",
    "GapAware",
    "GapAwareAdam",
    "GapPenalty",
    "GlobalGapPenalty",
    "GoSGD",
    "GroupSGD",
    "HierarchicalSGD",
    "LWP",
    "LocalSGD",
    "MultiASGD",
    "NAGASGD",
    "NesterovBMUF",
    "OSGP",
    "Overlap",
    "PostLocalSGD",
    "PullGossip",
    "PushGossip",
    "Rounded",
    "SGP",
    "SSP",
    "SlowMo",
    "SlowMoNoAverage",
    "StalenessAware",
    "StalenessPenalty",
    "SyncPullGossip",
    "SyncPushGossip",
    "all_methods",
    "find",
]

def all_methods() -> list[type[Method]]: ...
def find(name: str) -> type[Method]: ...
