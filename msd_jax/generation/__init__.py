"""Who writes the responses, and how: rollouts, stored responses, analyses, likelihoods."""
