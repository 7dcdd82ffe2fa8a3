"""Mixture of experts: router, experts, grouped matmul, exchange between devices."""
