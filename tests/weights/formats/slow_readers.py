"""Readers of both layouts that follow their descriptions bit by bit: slow, and independent."""

from __future__ import annotations

import re

import numpy as np


def bit(words, place):
    """One bit of a stream of 32-bit words."""
    return (int(words[place // 32]) >> (place % 32)) & 1


def number(words, index, bits):
    """The `index`-th integer of `bits` bits in a stream, lowest bits first."""
    return sum(bit(words, index * bits + place) << place for place in range(bits))


def read_gptq(tensors, bits, version):
    """The dense matrix [out, in] in float64, by the definition."""
    qweight, qzeros = tensors["qweight"].numpy(), tensors["qzeros"].numpy()
    scales, g_idx = tensors["scales"].numpy().astype(np.float64), tensors["g_idx"].numpy()
    rows, columns = qweight.shape[1], len(g_idx)
    dense = np.zeros((rows, columns))
    for row in range(rows):
        for column in range(columns):
            group = g_idx[column]
            zero = number(qzeros[group], row, bits) + (1 if version == 1 else 0)
            dense[row, column] = scales[group, row] * (number(qweight[:, row], column, bits) - zero)
    return dense


def read_compressed_tensors(tensors, weights):
    """The dense matrix [out, in] in float64, by the definition; `weights` is a group's."""
    packed, bits = tensors["weight_packed"].numpy(), weights["num_bits"]
    scales = tensors["weight_scale"].numpy().astype(np.float64)
    rows, columns = tensors["weight_shape"].tolist()
    dense = np.zeros((rows, columns))
    for row in range(rows):
        for column in range(columns):
            group = column // (weights["group_size"] or columns)
            zero = 1 << (bits - 1)
            if not weights["symmetric"]:
                zero = number(tensors["weight_zero_point"].numpy()[:, group], row, bits)
            dense[row, column] = scales[row, group] * (number(packed[row], column, bits) - zero)
    return dense


def group_of(config, name):
    """A layer's group by `config_groups`; `None` where it stays float."""
    found = [one for one in config["config_groups"].values() if name in one["targets"]]
    assert len(found) + (name in config["ignore"]) == 1, name
    return found[0]["weights"] if found else None


def settings_of(config, name):
    """A layer's settings by the rules of `dynamic`; `None` where it stays float."""
    plain = {key: config[key] for key in ("bits", "group_size", "sym")}
    for key, overrides in config["dynamic"].items():
        sign, pattern = key[:2], key[2:]
        if re.match(pattern, name):
            return None if sign == "-:" else {**plain, **overrides}
    return plain


def read_vptq(tensors, config):
    """The dense matrix [out, in] in float64, by the definition."""
    rows, columns = config["out_features"], config["in_features"]
    groups, size, apart = config["group_num"], config["group_size"], config["outlier_size"]
    length, entries = config["vector_lens"][1], config["num_centroids"][1]
    residual_entries = config["num_res_centroids"][1]
    bits = int(np.log2(entries))
    residual_bits = int(np.log2(residual_entries)) if residual_entries > 0 else 0
    indices = tensors["indices"].numpy()
    books = tensors["centroids.weight"].double().numpy().reshape(groups, entries, length)
    ordered = np.zeros((rows, columns))
    for row in range(rows):
        for column in range(apart):
            outlier_length = config["vector_lens"][0]
            book = tensors["outlier_centroids.weight"].double().numpy()
            index = int(tensors["outlier_indices"][0, row // outlier_length, column]) % 65536
            ordered[row, column] = book[0, index * outlier_length + row % outlier_length]
        for group in range(groups):
            stream = indices[group, row // length]
            for place in range(size):
                code = number(stream, place, bits + residual_bits)
                value = books[group, code % entries, row % length]
                if residual_bits:
                    book = tensors["res_centroids.weight"].double().numpy()
                    value += book[group, (code // entries) * length + row % length]
                ordered[row, apart + group * size + place] = value
    dense = np.zeros_like(ordered)
    for place in range(columns):
        column = int(tensors["perm"][place]) % 65536 if config["enable_perm"] else place
        dense[:, column] = ordered[:, place]
    if config["enable_norm"]:
        dense = dense * tensors["weight_scale"].double().numpy()
        dense = dense + tensors["weight_bias"].double().numpy()
    return dense
