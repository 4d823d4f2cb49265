package faultnet

import (
	"crypto/x509"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

func TestCertificatesHoldForTheirNamesAndUses(t *testing.T) {
	ca := NewCA()
	server, client := ca.Server("a.test", "10.0.0.1", "fe80::1"), ca.Client("alice")
	verify := func(cert *x509.Certificate, name string, usage x509.ExtKeyUsage, roots *x509.CertPool) error {
		_, err := cert.Verify(x509.VerifyOptions{DNSName: name, KeyUsages: []x509.ExtKeyUsage{usage}, Roots: roots})
		return err
	}
	for _, name := range []string{"a.test", "10.0.0.1", "fe80::1"} {
		assert.NoError(t, verify(server.Leaf, name, x509.ExtKeyUsageServerAuth, ca.Pool()))
	}
	assert.Error(t, verify(server.Leaf, "b.test", x509.ExtKeyUsageServerAuth, ca.Pool()))
	assert.Error(t, verify(server.Leaf, "a.test", x509.ExtKeyUsageClientAuth, ca.Pool()))
	assert.NoError(t, verify(client.Leaf, "", x509.ExtKeyUsageClientAuth, ca.Pool()))
	assert.Equal(t, "alice", client.Leaf.Subject.CommonName)
	assert.Error(t, verify(client.Leaf, "", x509.ExtKeyUsageServerAuth, ca.Pool()))

	err := verify(server.Leaf, "a.test", x509.ExtKeyUsageServerAuth, NewCA().Pool())
	var unknown x509.UnknownAuthorityError
	require.ErrorAs(t, err, &unknown, "no authority vouches for another's")
}

func TestCertificatesHoldInTheYearOfABubble(t *testing.T) {
	ca := NewCA()
	leaf := ca.Server("a.test").Leaf
	synctest.Test(t, func(t *testing.T) {
		_, err := leaf.Verify(x509.VerifyOptions{Roots: ca.Pool(), CurrentTime: time.Now()})
		assert.NoError(t, err)
	})
}
