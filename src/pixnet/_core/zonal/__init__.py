"""Statistics of the pixels of an image over shapes."""

from pixnet._core.zonal.statistics import VALID_NAMES, Mean, Statistic, Sum, find_statistic
from pixnet._core.zonal.zonal import ZonalStatistics, zonal_statistics

__all__ = ["VALID_NAMES", "Mean", "Statistic", "Sum", "ZonalStatistics", "find_statistic", "zonal_statistics"]
