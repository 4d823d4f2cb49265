package connpool

import (
	"crypto/x509"
	"os"
	"sync"
	"sync/atomic"

	"github.com/seed-ecb488c9/connpool/internal/sock"
)

// crypto/x509 reads the system's certificates from files, once in the life of a process,
// when the first certificate is verified. If no file handle is free in that moment, every
// verification fails from then on. In a dial that moment comes after the socket has taken a
// handle, perhaps the last. So the pool reads the certificates before the first TLS dial
// opens its socket.
var roots struct {
	mu     sync.Mutex // held while the certificates are read; only TLS dials wait for it
	loaded atomic.Bool
}

// loadRoots reads the certificates if the dial may need them. If no handle is free it returns
// the error that a dial would: then connect makes room for the certificates as for a dial.
func (sys *system) loadRoots(cfg *Config) error {
	given := cfg.TLS
	if roots.loaded.Load() || cfg.TLSFor == nil && given != nil && (given.RootCAs != nil || given.InsecureSkipVerify) {
		return nil
	}
	roots.mu.Lock()
	defer roots.mu.Unlock()
	if roots.loaded.Load() {
		return nil
	}
	if sys.noHandleFree() {
		return os.NewSyscallError("open", sock.ErrProcessFiles)
	}
	_, _ = x509.SystemCertPool() // a dial that verifies with them gets the error
	roots.loaded.Store(true)
	return nil
}
