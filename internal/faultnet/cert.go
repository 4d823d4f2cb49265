package faultnet

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"net"
	"time"
)

// CA is a certificate authority that exists in memory only.
type CA struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// The long validity is for the bubbles of testing/synctest, whose clock starts in the
// year 2000: a certificate issued outside a bubble must be valid inside.
var (
	notBefore = time.Date(1999, time.January, 1, 0, 0, 0, 0, time.UTC)
	notAfter  = time.Date(2199, time.January, 1, 0, 0, 0, 0, time.UTC)
)

// NewCA makes an authority with a fresh key. Two authorities do not trust each other.
func NewCA() *CA { return NewNamedCA("faultnet CA") }

// NewNamedCA is NewCA for an authority of this name. A client chooses among its certificates by
// the name of their authority.
func NewNamedCA(name string) *CA {
	ca := &CA{key: newKey()}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: name},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	ca.cert = sign(template, template, ca.key.Public(), ca.key)
	return ca
}

// Pool trusts the certificates that the authority issues, and no others.
func (ca *CA) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	return pool
}

// Server issues a certificate for a server of these host names and IP
// addresses, with the authority's own certificate at the end of the chain.
func (ca *CA) Server(names ...string) tls.Certificate {
	return ca.issue(x509.ExtKeyUsageServerAuth, names)
}

// Client issues a certificate for a client, which has name as its common name
// and as its only DNS name.
func (ca *CA) Client(name string) tls.Certificate {
	return ca.issue(x509.ExtKeyUsageClientAuth, []string{name})
}

// ServerUntil is Server with a certificate that ends at end.
func (ca *CA) ServerUntil(end time.Time, names ...string) tls.Certificate {
	return ca.issueUntil(end, x509.ExtKeyUsageServerAuth, names)
}

// ClientUntil is Client with a certificate that ends at end.
func (ca *CA) ClientUntil(end time.Time, name string) tls.Certificate {
	return ca.issueUntil(end, x509.ExtKeyUsageClientAuth, []string{name})
}

// Intermediate makes an authority whose certificate, which ends at end, is issued by ca. Its
// certificates have it in their chain instead of a root.
func (ca *CA) Intermediate(end time.Time) *CA {
	below := &CA{key: newKey()}
	template := &x509.Certificate{
		NotAfter:              end,
		Subject:               pkix.Name{CommonName: "faultnet intermediate CA"},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	below.cert = sign(template, ca.cert, below.key.Public(), ca.key)
	return below
}

func (ca *CA) issue(usage x509.ExtKeyUsage, names []string) tls.Certificate {
	return ca.issueUntil(notAfter, usage, names)
}

func (ca *CA) issueUntil(end time.Time, usage x509.ExtKeyUsage, names []string) tls.Certificate {
	template := &x509.Certificate{
		NotAfter:    end,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{usage},
	}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
			continue
		}
		template.DNSNames = append(template.DNSNames, name)
	}
	if len(names) > 0 {
		template.Subject.CommonName = names[0]
	}
	key := newKey()
	leaf := sign(template, ca.cert, key.Public(), ca.key)
	return tls.Certificate{
		Certificate: [][]byte{leaf.Raw, ca.cert.Raw},
		PrivateKey:  key,
		Leaf:        leaf,
	}
}

func newKey() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	return key
}

func sign(template, parent *x509.Certificate, public crypto.PublicKey, signer crypto.Signer) *x509.Certificate {
	template.NotBefore = notBefore
	if template.NotAfter.IsZero() {
		template.NotAfter = notAfter
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, signer)
	must(err)
	cert, err := x509.ParseCertificate(der)
	must(err)
	return cert
}

// must panics on an error that can occur only if this file is wrong: its callers pass a
// curve, templates and keys that they made themselves. Only the names come from outside,
// and a name that is no IA5 string is a mistake in the test.
func must(err error) {
	if err != nil {
		panic(fmt.Errorf("faultnet: making a certificate: %w", err))
	}
}
