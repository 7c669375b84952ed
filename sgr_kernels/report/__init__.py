"""Plots and pages made from plain numbers and images."""
