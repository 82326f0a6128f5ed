"""PPO on CartPole: each update is a roll-out of several games, and some epochs over its minibatches."""

import argparse

import gymnasium as gym
import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical

import offbeat as ob

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--updates", type=int, default=60)
parser.add_argument("--lr", type=float, default=2.5e-3)
parser.add_argument("--seed", type=int, default=1)
args = parser.parse_args()
num_envs, num_steps, epochs, minibatches = 4, 128, 4, 4
gamma, gae_lambda, clip, entropy_weight = 0.98, 0.8, 0.2, 0.0


class Agent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        self.actor = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))

    def forward(self, x: torch.Tensor) -> tuple[Categorical, torch.Tensor]:
        return Categorical(logits=self.actor(x)), self.critic(x).flatten()


def evaluate(games: int = 20) -> float:
    """The mean length of games without chance, 500 at most."""
    env, lengths = gym.make("CartPole-v1"), []
    for game in range(games):
        obs, _ = env.reset(seed=1000 + game)
        length, over = 0, False
        while not over:
            with torch.no_grad():
                action = int(agent.actor(torch.tensor(obs)).argmax())
            obs, _, terminated, truncated, _ = env.step(action)
            length, over = length + 1, terminated or truncated
        lengths.append(length)
    return float(np.mean(lengths))


torch.manual_seed(args.seed)
np.random.seed(args.seed)
agent = Agent()
optimizer = torch.optim.Adam(agent.parameters(), lr=args.lr, eps=1e-5)
replica = ob.Replica(agent, default=ob.methods.DiLoCo(period=16), optimizer=optimizer)
envs = gym.make_vec("CartPole-v1", num_envs=num_envs)
next_obs = torch.tensor(envs.reset(seed=int(np.random.randint(1 << 30)))[0])
next_done = torch.zeros(num_envs)
for update in replica.steps(args.updates):
    for group in optimizer.param_groups:
        group["lr"] = args.lr * (1 - update / args.updates)
    obs, dones = torch.zeros(num_steps, num_envs, 4), torch.zeros(num_steps, num_envs)
    actions, logprobs, rewards, values = (torch.zeros(num_steps, num_envs) for _ in range(4))
    for step in range(num_steps):
        obs[step], dones[step] = next_obs, next_done
        with torch.no_grad():
            policy, values[step] = agent(next_obs)
            actions[step] = policy.sample()
            logprobs[step] = policy.log_prob(actions[step])
        state, reward, terminated, truncated, _ = envs.step(actions[step].long().numpy())
        rewards[step] = torch.tensor(reward)
        next_obs, next_done = torch.tensor(state), torch.tensor(terminated | truncated).float()

    with torch.no_grad():  # advantages, backwards in time
        advantages, last = torch.zeros(num_steps, num_envs), torch.zeros(num_envs)
        following, alive = agent(next_obs)[1], 1 - next_done
        for t in reversed(range(num_steps)):
            delta = rewards[t] + gamma * following * alive - values[t]
            last = delta + gamma * gae_lambda * alive * last
            advantages[t], following, alive = last, values[t], 1 - dones[t]
    flat = [part.flatten(0, 1) for part in (obs, actions, logprobs, advantages, advantages + values)]

    for _ in range(epochs):
        for index in torch.randperm(num_envs * num_steps).chunk(minibatches):
            b_obs, b_actions, b_logprobs, b_advantages, b_returns = (part[index] for part in flat)
            policy, value = agent(b_obs)
            ratio = (policy.log_prob(b_actions) - b_logprobs).exp()
            b_advantages = (b_advantages - b_advantages.mean()) / (b_advantages.std() + 1e-8)
            surrogate = torch.min(b_advantages * ratio, b_advantages * ratio.clamp(1 - clip, 1 + clip)).mean()
            loss = 0.5 * (value - b_returns).square().mean() - surrogate - entropy_weight * policy.entropy().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            replica.step()

print(f"length {evaluate():.1f}")
