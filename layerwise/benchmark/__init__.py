"""Benchmarks that judge the library itself: does a high score mean that a layer is really needed?"""
