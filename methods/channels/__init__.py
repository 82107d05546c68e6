"""Channel widths by the error that calibration images show: `Channels`, the data-aware sibling of ITPruner."""

from methods.channels.method import Channels

__all__ = ["Channels"]
