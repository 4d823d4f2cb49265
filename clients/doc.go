// Package clients holds only tests: common client libraries, at their default settings,
// over the pool and through the gateway. The package is a module of its own, so that
// users of the pool do not get its requirements.
package clients
