"""How far two columns of classes are from independent."""

import numpy as np


def dependence(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's chi-square of the contingency table as a standard normal deviate (Wilson and Hilferty).

    Below 4 for all but 3 of 100 000 pairs of independent columns.
    """
    rows, columns = np.unique(first, return_inverse=True)[1], np.unique(second, return_inverse=True)[1]
    table = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(table, (rows, columns), 1)
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
    statistic = ((table - expected) ** 2 / expected).sum()
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / np.sqrt(spread))
