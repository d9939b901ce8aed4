"""The code released with *Deep Equilibrium Models* (Bai, Kolter & Koltun, 2019), and its successor of 2021."""
