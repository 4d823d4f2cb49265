package gateway

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/seed-ecb488c9/connpool"
)

// ServerFiles are the PEM files of a tls listener.
type ServerFiles struct {
	Cert, Key string
	ClientCA  string // "": clients need no certificate
}

// UpstreamFiles are the PEM files for a tls server.
type UpstreamFiles struct {
	CA         string // "": the system's roots
	ServerName string // "": the host of -to
	Cert, Key  string // "": no certificate of our own
}

func (f ServerFiles) fits(isTLS bool) (errs []error) {
	switch {
	case isTLS && (f.Cert == "" || f.Key == ""):
		errs = append(errs, fmt.Errorf("-listen is tls://: it needs -cert and -key"))
	case !isTLS && f != (ServerFiles{}):
		errs = append(errs, fmt.Errorf("-cert, -key and -client-ca are for a -listen that begins with tls://"))
	}
	return errs
}

func (f UpstreamFiles) fits(to *connpool.Addr) (errs []error) {
	if to.Transport != connpool.TLS {
		if f != (UpstreamFiles{}) {
			errs = append(errs, fmt.Errorf("-ca, -server-name, -upstream-cert and -upstream-key are for a -to that begins with tls://"))
		}
		return errs
	}
	if (f.Cert == "") != (f.Key == "") {
		errs = append(errs, fmt.Errorf("-upstream-cert and -upstream-key go together"))
	}
	if f.ServerName != "" {
		if to.ServerName != "" && to.ServerName != f.ServerName {
			errs = append(errs, fmt.Errorf("-server-name is %q and that of -to is %q: give one", f.ServerName, to.ServerName))
		}
		to.ServerName = f.ServerName
		if err := to.Validate(); err != nil {
			errs = append(errs, fmt.Errorf("-server-name: %w", err))
		}
	}
	return errs
}

// certificates holds what was last read from the files, and replaces it when
// they change. Connections that exist keep what they were made with.
type certificates struct {
	server   ServerFiles
	upstream UpstreamFiles

	forClients atomic.Pointer[tls.Config] // nil: the listener is not tls
	forServer  atomic.Pointer[tls.Config]

	mu   sync.Mutex // guards seen; reading the files happens under it, so that two reloads do not cross
	seen [][]byte   // the contents that are in force
}

// load reads the files and puts them in force if all of them are good, else
// none. It reports whether anything had changed.
func (c *certificates) load() (changed bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var contents [][]byte
	read := func(flag, name string) []byte {
		if name == "" || err != nil {
			contents = append(contents, nil)
			return nil
		}
		var b []byte
		if b, err = os.ReadFile(name); err != nil {
			err = fmt.Errorf("-%s: %w", flag, err)
		}
		contents = append(contents, b)
		return b
	}
	cert, key, clientCA := read("cert", c.server.Cert), read("key", c.server.Key), read("client-ca", c.server.ClientCA)
	ca, ourCert, ourKey := read("ca", c.upstream.CA), read("upstream-cert", c.upstream.Cert), read("upstream-key", c.upstream.Key)
	if err != nil {
		return false, err
	}
	changed = c.seen == nil
	for i := range c.seen {
		changed = changed || !bytes.Equal(c.seen[i], contents[i])
	}
	if !changed {
		return false, nil
	}
	var forClients, forServer *tls.Config
	if cert != nil {
		forClients = &tls.Config{MinVersion: tls.VersionTLS12}
		if forClients.Certificates, err = keyPair("-cert and -key", cert, key); err != nil {
			return false, err
		}
		if clientCA != nil {
			if forClients.ClientCAs, err = roots("-client-ca", clientCA); err != nil {
				return false, err
			}
			forClients.ClientAuth = tls.RequireAndVerifyClientCert
		}
		// A session of before a change must not be resumed after it.
		var ticketKey [32]byte
		rand.Read(ticketKey[:])
		forClients.SetSessionTicketKeys([][32]byte{ticketKey})
	}
	forServer = &tls.Config{MinVersion: tls.VersionTLS12}
	if ca != nil {
		if forServer.RootCAs, err = roots("-ca", ca); err != nil {
			return false, err
		}
	}
	if ourCert != nil {
		if forServer.Certificates, err = keyPair("-upstream-cert and -upstream-key", ourCert, ourKey); err != nil {
			return false, err
		}
	}
	c.forClients.Store(forClients)
	c.forServer.Store(forServer)
	c.seen = contents
	return true, nil
}

func keyPair(flags string, cert, key []byte) ([]tls.Certificate, error) {
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", flags, err)
	}
	return []tls.Certificate{pair}, nil
}

func roots(flag string, pem []byte) (*x509.CertPool, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s: there is no PEM certificate in the file", flag)
	}
	return pool, nil
}

// listener is the configuration of a tls listener: each handshake takes what is
// in force.
func (c *certificates) listener() *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS12,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return c.forClients.Load(), nil },
	}
}

// Certificates describes those in force, with their ends of life, and reports
// whether one has passed its own.
func (g *Gateway) Certificates() (lines []string, expired bool) {
	describe := func(flag string, cfg *tls.Config) {
		if cfg == nil {
			return
		}
		for _, c := range cfg.Certificates {
			if c.Leaf == nil {
				continue
			}
			left := time.Until(c.Leaf.NotAfter)
			state := fmt.Sprintf("valid until %s", c.Leaf.NotAfter.UTC().Format(time.DateOnly))
			if left <= 0 {
				expired = true
				state = fmt.Sprintf("EXPIRED on %s", c.Leaf.NotAfter.UTC().Format(time.DateOnly))
			}
			lines = append(lines, fmt.Sprintf("%s: %s, %s", flag, strings.Join(append(c.Leaf.DNSNames, c.Leaf.Subject.CommonName), ", "), state))
		}
	}
	describe("-cert", g.certs.forClients.Load())
	describe("-upstream-cert", g.certs.forServer.Load())
	return lines, expired
}
