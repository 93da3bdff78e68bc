"""Objectives, optimiser steps, the loop, and the builders of trainings. Finished weights are measured in evaluation."""
