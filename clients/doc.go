// Package clients holds tests only: client libraries that people use, at their
// defaults, over the pool and through the gateway. They live in a module of
// their own, so that nobody who imports the pool gets their requirements.
package clients
