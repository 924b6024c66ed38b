"""What a rollout is: trajectory schema, policy servers, rollout workers, the stream and weight receiving."""
